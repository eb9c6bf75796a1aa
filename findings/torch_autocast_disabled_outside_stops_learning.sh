#!/usr/bin/env bash
# A disabled autocast context around a training loop stops a model of float32 weights from learning in bf16.
#
# Expected: torch.autocast(..., enabled=False) is the way to switch autocast off for a part of a program. A loop inside
# of it, whose steps use an autocast context of their own for the forward pass as the documentation recommends, computes
# as without the outer context.
# Seen (PyTorch 2.14.1 and 2.15.0, CPU): the loss of every step is that of the first, to the last bit, although the
# optimiser changes the weights. The casts of weights to bf16 are kept until the outermost context ends, even if that one
# is disabled; the inner contexts no longer end the cache, and an update of a weight in place does not invalidate its
# cast. There is no warning. With cache_enabled=False of the outer context, which the inner ones then have, too, the
# model learns.
#
# Exits with 0 if the behaviour is as described, with 1 if it has changed. Installs about 5 GB in a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from contextlib import nullcontext

import torch
from torch import nn


def losses(outer):
    """Return the losses of 100 steps of SGD on a small regression."""
    torch.manual_seed(0)
    inputs = torch.randn(256, 20)
    wanted = (inputs @ torch.randn(20, 1)).sign()
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with outer:
        for _ in range(100):
            with torch.autocast("cpu", torch.bfloat16):
                loss = (model(inputs) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
    return seen


print("torch", torch.__version__)
cases = {
    "none": nullcontext(),
    "disabled": torch.autocast("cpu", enabled=False),
    "disabled, without cache": torch.autocast("cpu", enabled=False, cache_enabled=False),
}
ends = {}
for name, outer in cases.items():
    seen = losses(outer)
    ends[name] = seen
    print(f"outer context {name}: loss {seen[0]:.4f} at the first step, {seen[-1]:.4f} at the last")
as_described = (
    ends["none"][-1] < 0.5 * ends["none"][0]
    and set(ends["disabled"]) == {ends["disabled"][0]}
    and ends["disabled, without cache"][-1] < 0.5 * ends["none"][0]
)
sys.exit(0 if as_described else 1)
PYTHON
