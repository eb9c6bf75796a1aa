"""In-memory sources, an encoder, and Gaussian clouds of features for evaluation."""

import torch
from torch import nn

from inbatch.evaluation import (
    Embeddings,
)
from inbatch.models import create_encoder


class Pictures:
    """In-memory source; images may differ in size."""

    def __init__(self, images, labels, name="pictures"):
        self.images, self.labels, self.name = images, torch.as_tensor(labels), name

    def __len__(self):
        return len(self.images)

    def image(self, i):
        return self.images[i]

    def identity(self, i):
        return f"folder/{i}.png"


def pictures(n=21, sizes=((20, 20),), channels=1):
    draw = torch.Generator().manual_seed(0)
    images = [
        torch.randint(0, 256, (channels, *sizes[i % len(sizes)]), generator=draw, dtype=torch.uint8) for i in range(n)
    ]
    return Pictures(images, [i % 3 for i in range(n)])


def encoder(channels=1):
    """Return a small encoder in training mode whose data statistics differ from those of the test images."""
    model = create_encoder("tiny", size=20, channels=channels).train()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
    model(3 * torch.randn(16, channels, 20, 20) + 1)
    return model


def clouds(n, classes=4, width=8, spread=1.0, seed=0, name="clouds"):
    """Draw Gaussian clouds around fixed centres; `spread` sets how hard they are to separate."""
    centres = 2 * torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    vectors = centres[labels] + spread * torch.randn(n, width, generator=draw)
    return Embeddings(vectors, labels, tuple(map(str, range(n))), name, "clouds")
