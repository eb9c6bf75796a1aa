#!/usr/bin/env bash
# Instance normalisation of a batch of one image has wrong gradients on a CPU if they arrive in the layout channels-last.
#
# Expected: model.to(memory_format=torch.channels_last) changes the layout of the memory, not the results. A network with
# nn.InstanceNorm2d (style transfer, image translation) has the same gradients in both layouts, up to rounding.
# Seen (PyTorch 2.11.0, 2.14.1 and 2.15.0, CPU): for a batch of one image, the gradients of everything before the norm are
# wrong if a convolution in channels-last follows, directly or after SiLU, GELU, ELU, Mish or tanh: their gradient has that
# layout, and what leaves the norm is as far from the right one as from a random one. That of the contiguous layout is
# confirmed by finite differences. With two images both layouts agree. After ReLU the gradient is contiguous, and right.
# The forward pass is right, there is no warning, and the loss still falls, because the layers behind the norm do learn.
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

import torch
from torch import nn


def network(layout):
    """Return a small network of two convolutions with a norm between them, the same for every layout."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 3)).double()
    return layers.to(memory_format=layout)


def loss(model, images, weight):
    return (model(images) * weight).sum()


def first_gradient(layout, count):
    """Return the gradient of the first convolution's weight for a number of images."""
    torch.manual_seed(1)
    images = torch.randn(count, 3, 16, 16, dtype=torch.float64)
    weight = torch.randn(count, 4, 12, 12, dtype=torch.float64)
    model = network(layout)
    loss(model, images.contiguous(memory_format=layout), weight).backward()
    return model[0].weight.grad, images, weight


def numeric(images, weight, place, step=1e-6):
    """Return the derivative of the loss by one weight, from two forward passes."""
    values = []
    for sign in (1, -1):
        model = network(torch.channels_last)
        with torch.no_grad():
            model[0].weight[place] += sign * step
            values.append(loss(model, images, weight))
    return float(values[0] - values[1]) / (2 * step)


print("torch", torch.__version__)
errors = {}
for count in (1, 2):
    right, images, weight = first_gradient(torch.contiguous_format, count)
    other, _, _ = first_gradient(torch.channels_last, count)
    errors[count] = float((other - right).norm() / right.norm())
    place = (2, 1, 0, 2)
    true = numeric(images, weight, place)
    print(
        f"{count} image(s): relative difference of the gradients in channels-last {errors[count]:.2g}; of one weight: "
        f"contiguous {float(right[place]):.5f}, channels-last {float(other[place]):.5f}, finite difference {true:.5f}"
    )
    contiguous_is_right = abs(float(right[place]) - true) < 1e-4 * max(1.0, abs(true))
    if not contiguous_is_right:
        sys.exit("the gradient of the contiguous layout is not that of the finite difference")
if not (errors[1] > 0.5 and errors[2] < 1e-9):
    sys.exit("The behaviour has changed.")
print("As described: wrong for one image only.")
PYTHON
