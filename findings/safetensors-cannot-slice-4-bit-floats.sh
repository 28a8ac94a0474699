#!/usr/bin/env bash
# safetensors saves and loads 4-bit floats, and can take no slice of them: the shape that it tells is not the tensor's.
#
# One would expect: a tensor that save_file writes and load_file gives back can be read in slices as well, as those do
# who load a checkpoint onto several devices: get_slice(name)[rows] is tensor[rows], with the tensor's shape.
# Seen with safetensors 0.8.0, torch 2.13.0: a tensor of float4_e2m1fn_x2, PyTorch's type for two 4-bit floats in a
# byte, comes back from load_file and get_tensor equal in all bytes. get_slice says that its shape has twice the
# columns, as it counts 4-bit numbers, and any slice, of all rows too, ends in a RuntimeError about a shape that does
# not fit. The same bytes as uint8 are sliced as they should.
# Guess written down before the run: slices of rows are right; slices of columns may count numbers in place of bytes.
# Where it comes from: the header has the type F4, whose shape counts single numbers; the binding for PyTorch views the
# bytes of a slice as float4_e2m1fn_x2, which has half as many elements, and reshapes them to the header's shape.
# Whom it hurts: those who keep weights in NVFP4 or MXFP4 in PyTorch's own type and load them in parts, by rows or by
# columns: tensor parallelism, and readers that save memory. They have to keep the bytes as uint8, as exporters do.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - 2>messages <<'PYTHON'
import sys

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

codes = torch.randint(256, (64, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
save_file({"floats": codes.clone().view(torch.float4_e2m1fn_x2), "bytes": codes}, "model.safetensors")
whole = load_file("model.safetensors")["floats"]
same = whole.dtype == torch.float4_e2m1fn_x2 and torch.equal(whole.view(torch.uint8), codes)
print(f"load_file: {tuple(whole.shape)} {whole.dtype}, the same bytes: {same}")
refused = []
with safe_open("model.safetensors", "pt") as file:
    kept = torch.equal(file.get_tensor("floats").view(torch.uint8), codes)
    floats, plain = file.get_slice("floats"), file.get_slice("bytes")
    print(f"get_slice: shape {floats.get_shape()} of the floats, {plain.get_shape()} of the same bytes")
    for name, part in {
        "all": (slice(None),), "eight rows": (slice(0, 8),), "eight columns": (slice(None), slice(0, 8)),
    }.items():  # fmt: skip
        right = torch.equal(plain[part], codes[part])
        try:
            floats[part]
        except RuntimeError as error:
            refused.append(name)
            print(f"{name}: {error}; of the bytes, right: {right}")
shapes = floats.get_shape() == [64, 64] and plain.get_shape() == [64, 32]
sys.exit(0 if same and kept and shapes and right and len(refused) == 3 else 1)
PYTHON
