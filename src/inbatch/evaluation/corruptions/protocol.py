"""Robustness to corruptions: classifiers fitted on clean features, tested on every corruption."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from inbatch.errors import ConfigError
from inbatch.evaluation.accuracy import hit_shares
from inbatch.evaluation.corruptions.image_rng import Chance
from inbatch.evaluation.corruptions.registry import CORRUPTIONS, SEVERITIES, SMALL
from inbatch.evaluation.embed import Encoder, Source, encode
from inbatch.evaluation.embeddings import Embeddings, matched
from inbatch.evaluation.knn import equal_scores, knn_scores
from inbatch.evaluation.linear_probe import fit
from inbatch.evaluation.probe_presets import Lbfgs, Sgd
from inbatch.rng import fold, permutation
from inbatch.runtime.isolation import usual_state

_AT_ONCE = 2**22  # values of images that are corrupted together


@usual_state()
def corruptions(
    encoder: Encoder,
    train: Embeddings,
    test: Embeddings,
    source: Source,
    *,
    most: int | None = 1000,
    k: int = 200,
    temperature: float = 0.1,
    distance: str = "cosine",
    probe: str | Lbfgs | Sgd = "lbfgs",
    seed: int = 0,
    batch: int = 512,
    precision: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Return top1 in [0, 1] of k-NN and linear probe, fitted on clean features, for every corruption and severity.

    The result holds the means over all, over each kind, over each corruption, and `drop`: the share of the accuracy on
    the same clean images that is lost (Hendrycks and Dietterich 2019). Images are first prepared to the encoder's size.

    Args:
        encoder: the encoder of the features.
        train: clean training features.
        test: clean test features of the images in `source`.
        source: the test images.
        most: maximum number of test images, the same ones in each call; None for all.
        k: number of neighbours of k-NN.
        temperature: of k-NN.
        distance: of k-NN.
        probe: see `linear_probe`.
        seed: seed of the corruptions.
        batch: images at a time.
        precision: of the encoder.

    Raises:
        ConfigError: as `check`.
    """
    train, test, classes = matched(train, test)
    device, equal = encoder.device, equal_scores(temperature, distance)
    if most is not None and most < 1:
        raise ConfigError(f"corruptions need a test image at least, not {most}.")
    if most is not None and most < len(test):
        test = test.take(permutation(0, 0, len(test))[:most].sort().values)
    linear, nearest = fit(train, classes, probe, seed=seed, device=device), min(k, len(train))
    bank = train.vectors.to(device)

    def count_hits(vectors: Tensor, labels: Int[Tensor, "n"]) -> Float[Tensor, "2"]:
        """Return the numbers of hits of k-NN and of the probe."""
        near = knn_scores(
            vectors.to(device), bank, train.labels, classes, k=nearest, temperature=temperature, distance=distance
        )
        of_knn, of_probe = hit_shares(near, labels, equal=equal), hit_shares(linear.scores(vectors), labels)
        return torch.stack([of_knn.sum(), of_probe.sum()])

    clean = count_hits(test.vectors, test.labels)
    correct = torch.zeros(len(CORRUPTIONS), len(SEVERITIES), 2, dtype=torch.float64)
    side = 0
    for images, part in _chunks(encoder, source, test, batch):
        side, index = max(images.shape[2:]), part.index.to(device)
        for number, corruption in enumerate(CORRUPTIONS.values()):
            chance = Chance(fold(seed, number), index)
            for severity in SEVERITIES:
                corrupted = encoder.prepare(corruption(images, severity, chance))
                correct[number, severity - 1] += count_hits(encode(encoder, corrupted, precision).float(), part.labels)
    kinds = dict.fromkeys(corruption.kind for corruption in CORRUPTIONS.values())
    of_kind = {kind: [c.kind == kind for c in CORRUPTIONS.values()] for kind in kinds}
    share, before = correct / len(test), clean / len(test)
    protocol = {"k": nearest, "distance": distance, "temperature": temperature if distance == "cosine" else None}
    return {
        **_figures(share.mean((0, 1)), before),
        "clean": {"knn": before[0].item(), "linear": before[1].item()},
        "kinds": {kind: _figures(share[torch.tensor(these)].mean((0, 1)), before) for kind, these in of_kind.items()},
        "each": {name: _figures(s.mean(0), before, s) for name, s in zip(CORRUPTIONS, share, strict=True)},
        "images": len(test),
        "parameters": "CIFAR-10-C" if side <= SMALL else "ImageNet-C",
        "side": side,
        "seed": seed,
        "probe": linear.protocol["probe"],
        **protocol,
    }


def _figures(top1: Tensor, before: Tensor, each: Tensor | None = None) -> dict[str, dict[str, Any]]:
    """Return, for k-NN and probe: top1, the share of the clean accuracy that is lost, and the figures per severity."""
    return {
        name: {"top1": top1[i].item(), "drop": (1 - top1[i] / before[i]).item() if before[i] else None}
        | ({} if each is None else {"severities": each[:, i].tolist()})
        for i, name in enumerate(("knn", "linear"))
    }


def _chunks(
    encoder: Encoder, source: Source, test: Embeddings, batch: int
) -> Iterator[tuple[UInt8[Tensor, "n c s s"], Embeddings]]:
    """Yield the test images on the encoder's device, resized and cropped as for the encoder but still uint8."""
    prepare: Any = encoder.prepare
    channels = prepare.channels
    pixels = replace(prepare, mean=(0.0,) * channels, std=(1.0,) * channels)
    step = max(1, min(batch, _AT_ONCE // (channels * prepare.size**2)))
    for places in torch.arange(len(test)).split(step):
        part = test.take(places)
        images = pixels(source.image(i) for i in part.index.tolist())
        yield (images.clamp(0, 1) * 255).round().to(encoder.device, torch.uint8), part


def check(encoder: Encoder) -> None:
    """Raise ConfigError unless the encoder's images can be corrupted."""
    channels = getattr(encoder.prepare, "channels", None)
    if channels not in (1, 3):
        raise ConfigError(
            f"corruptions are of images with 1 or 3 channels, and this encoder takes {channels}: leave them out."
        )
