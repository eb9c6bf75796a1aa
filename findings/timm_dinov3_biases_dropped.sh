#!/usr/bin/env bash
# timm loads original DINOv3 weights with query and value biases into the model without biases, and drops them.
#
# Expected: create_model(..., pretrained=True) loads strictly, so weights with parameters that the model does not have
# raise an error, or at least a warning that names the variant "..._qkvb" that has them.
# Seen (timm 1.0.31, torch 2.14.1): no error and no warning; one line per block, "`q_bias` is not an nn.Parameter", is
# printed on stdout, where programs write their results. The features are then other ones: the relative difference is
# 0.93 for random biases and a layer scale of 1. The variant "..._qkvb" loads the same file without a line.
#
# Exits with 0 if the behaviour is as described, with 1 if it has changed. Installs about 5 GB in a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check timm==1.0.31 torch==2.14.1 torchvision==0.29.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import io
import sys
import warnings

import timm
import torch

torch.set_grad_enabled(False)
torch.manual_seed(0)
print("timm", timm.__version__, "torch", torch.__version__)
weights = {}  # under the names of the original files
for name, value in timm.create_model("vit_small_patch16_dinov3_qkvb", img_size=32, num_classes=0).state_dict().items():
    if name.endswith("q_bias"):
        bias = torch.cat([torch.randn(384), torch.zeros(384), torch.randn(384)])  # queries, keys, values
        weights[name.replace("q_bias", "qkv.bias")] = bias
    elif not name.endswith("v_bias"):
        value = torch.ones_like(value) if "gamma" in name else value
        for ours, theirs in (("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma")):
            name = name.replace(ours, theirs)
        weights[name] = value
torch.save(weights, "dinov3.pth")

images, features, printed = torch.rand(2, 3, 32, 32), [], []
for kind in ("vit_small_patch16_dinov3_qkvb", "vit_small_patch16_dinov3"):
    lines = io.StringIO()
    with contextlib.redirect_stdout(lines), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        where = {"file": "dinov3.pth"}
        model = timm.create_model(kind, img_size=32, num_classes=0, pretrained=True, pretrained_cfg_overlay=where)
    features.append(model.eval()(images))
    printed.append(lines.getvalue().splitlines())
    print(f"{kind}: {len(printed[-1])} lines on stdout {printed[-1][:1]}, {len(warned)} warnings")
difference = float((features[0] - features[1]).norm() / features[0].norm())
print(f"relative difference of the features: {difference:.2f}")
expected = printed[0] == [] and printed[1] == ["`q_bias` is not an nn.Parameter"] * 12 and difference > 0.1
print("as described" if expected else "CHANGED")
sys.exit(0 if expected else 1)
PYTHON
