"""Watch a training loop that does not use inbatch: k-NN accuracy and signs of collapse after every epoch.

    python examples/monitor.py

The views, `knn_scores`, `feature_std` and `rankme` are plain functions of tensors. The model, the loss (SimSiam
without a predictor, which collapses) and the loop are the user's own; the second run uses NT-Xent and does not.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import inbatch
from inbatch.data import open_data
from inbatch.data.views import View
from inbatch.evaluation import feature_std, knn_scores, rankme

EPOCHS, BATCH = 3, 128
transform = inbatch.views("digits", size=20, channels=1, mean=[0.0], std=[1.0])
clean = inbatch.views([View(20, scale=None, flip=0.0)], channels=1, mean=[0.0], std=[1.0])


def pixels(split: str) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 20, 20) uint8 and labels."""
    source = open_data("digits-canvas", split)
    return torch.stack([source.image(i) for i in range(len(source))]), source.labels


def agreement(z: tuple[Tensor, Tensor]) -> Tensor:
    """Return minus the cosine of two views: constant rows are its minimum."""
    return -nn.functional.cosine_similarity(z[0], z[1]).mean()


def train(name: str, loss_of: Callable[[tuple[Tensor, Tensor]], Tensor]) -> None:
    (images, labels), (queries, classes) = pixels("train"), pixels("test")
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.AdaptiveMaxPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(EPOCHS):
        for index in torch.randperm(len(images)).split(BATCH):
            first, second = transform(images[index], key=epoch, index=index)
            optimizer.zero_grad()
            loss_of((model(first), model(second))).backward()
            optimizer.step()
        with torch.no_grad():
            bank, rows = (model(clean(part)[0]) for part in (images, queries))
        hits = knn_scores(rows, bank, labels, 10, k=20).argmax(1) == classes
        print(f"{name}, epoch {epoch}: k-NN accuracy {hits.float().mean():.3f}, feature std {feature_std(bank):.3f}, "
              f"RankMe {rankme(bank):.1f} of {bank.shape[1]}")  # fmt: skip


if __name__ == "__main__":
    train("agreement alone", agreement)
    train("nt_xent", lambda z: inbatch.losses.nt_xent(torch.stack(z), 0.2))
