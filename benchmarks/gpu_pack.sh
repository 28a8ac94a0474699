#!/usr/bin/env bash
# Packs what benchmarks/gpu.sh needs on a GPU machine without network, on a machine that has one:
#   benchmarks/gpu_pack.sh FOLDER [--python 3.12] [--image FILE]
# FOLDER gets pieces of at most SIZE (60M) and their SHA-256: wheels for that Python on Linux, weights, texts, tasks.
# --image: what the GPU machine has, as its `pip list` shows it; by default torch and transformers with what they need.
set -euo pipefail
SOURCES="rouge-score sqlitedict word2number" # published as sources only, of Python alone
folder=$(realpath -m "$1") python=3.12 image=()
shift
while [ $# -gt 0 ]; do
  case $1 in
    --python) python=$2 ;;
    --image) image=(--image "$(realpath "$2")") ;;
    *) echo "gpu_pack.sh: $1 is not known; use --python or --image" >&2 && exit 2 ;;
  esac
  shift 2
done
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$folder" "$work/cache" "$work/wheels"
"$bin/python" benchmarks/gpu_pack.py --python "$python" "${image[@]}" >"$work/all"
for name in $SOURCES; do grep "^$name==" "$work/all" || true; done >"$work/sources"
grep -vxFf "$work/sources" "$work/all" >"$work/binaries"
platforms=$(printf -- '--platform manylinux_2_%s_x86_64 ' {17..34} && echo --platform manylinux2014_x86_64)
# shellcheck disable=SC2086
"$bin/python" -m pip download --quiet --no-deps --only-binary :all: --python-version "$python" --implementation cp \
  $platforms --dest "$work/wheels" --requirement "$work/binaries"
"$bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$work/wheels" --requirement "$work/sources"
"$bin/python" -c 'from studylib.data.sources import ARCHIVES, fetch; print(*map(fetch, ARCHIVES), sep="\n")' |
  xargs -I{} ln -s {} "$work/cache/"
rm -f "$folder"/piece-*
tar -C "$work" -chz cache wheels | split --bytes "${SIZE:-60M}" --numeric-suffixes - "$folder/piece-"
(cd "$folder" && sha256sum piece-* >SHA256SUMS)
du -h "$folder"/piece-*
