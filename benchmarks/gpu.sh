#!/usr/bin/env bash
# Checks, measures and runs the study on a GPU of a machine without network, in nine minutes:
#   benchmarks/gpu.sh PIECES OUTPUT [--cpu]
# PIECES: the folder that benchmarks/gpu_pack.sh made elsewhere. OUTPUT gets a summary, the records and a log.
# --cpu: everything in small, to try it where there is no GPU. PYTHON: the machine's, with torch (python3).
set -euo pipefail
until=$(($(date +%s) + 60 * ${MINUTES:-9}))
pieces=$(realpath "$1") output=$(realpath -m "$2") python=${PYTHON:-python3}
shift 2
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$output"
(cd "$pieces" && sha256sum --quiet --check SHA256SUMS)
cat "$pieces"/piece-* | tar -xz -C "$work"
"$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" "$work"/wheels/*.whl
export PYTHONPATH=$PWD:$work/site STUDY_CACHE=$work/cache HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
"$python" benchmarks/gpu.py "$output" --work "$work" --until "$until" "$@" 2>&1 | tee "$output/log.txt"
