#!/usr/bin/env bash
# A folder that timm writes with its own export cannot be opened by transformers' Auto classes.
#
# Expected: timm.models.save_for_hf writes the layout of the model hub, transformers has a wrapper for that layout, so
# AutoModel and AutoModelForImageClassification open the folder, as timm itself does.
# Seen (timm 1.0.31, transformers 5.24.0): TypeError, "got multiple values for keyword argument 'num_classes'". timm
# records the arguments of the model in `model_args`, num_classes among them, for every model; the wrapper passes its
# own num_classes and then all of `model_args`. Without that one entry the folder opens, with the same output as timm's.
#
# Exits with 0 if the behaviour is as described, with 1 if it has changed. Installs about 5 GB in a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    timm==1.0.31 transformers==5.24.0 torch==2.14.1 torchvision==0.29.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys
from pathlib import Path

import timm
import torch
import transformers
from timm.models import save_for_hf
from transformers import AutoModel, AutoModelForImageClassification

torch.set_grad_enabled(False)
print("timm", timm.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
model = timm.create_model("resnet10t", num_classes=3).eval()
save_for_hf(model, "saved", safe_serialization=True)
images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
expected = model(images)
again = timm.create_model("local-dir:saved", pretrained=True).eval()
print("timm opens it, largest difference:", float((again(images) - expected).abs().max()))

changed = not torch.equal(again(images), expected)
for kind in (AutoModel, AutoModelForImageClassification):
    try:
        kind.from_pretrained("saved")
        print(kind.__name__, "opens it")
        changed = True
    except TypeError as error:
        print(kind.__name__, "TypeError:", str(error).rpartition(".")[2])
        changed |= "multiple values for keyword argument 'num_classes'" not in str(error)

config = json.loads(Path("saved/config.json").read_text())
del config["model_args"]["num_classes"]
Path("saved/config.json").write_text(json.dumps(config))
opened = AutoModelForImageClassification.from_pretrained("saved").eval()
difference = float((opened(pixel_values=images).logits - expected).abs().max())
print("without model_args.num_classes: opens, largest difference:", difference)
sys.exit(1 if changed or difference else 0)
PYTHON
