"""Evaluation of an encoder on two data sets: figures with their protocol, independent of the method."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch

from inbatch.errors import ConfigError
from inbatch.evaluation.clustering import clustering
from inbatch.evaluation.corruptions import check, corruptions
from inbatch.evaluation.embed import Encoder, Source, embed
from inbatch.evaluation.embeddings import Embeddings, class_count
from inbatch.evaluation.few_labels import SHARES, few
from inbatch.evaluation.finetune import Finetune, finetune
from inbatch.evaluation.knn import knn
from inbatch.evaluation.linear_probe import linear_probe
from inbatch.evaluation.probe_presets import Lbfgs, Sgd

PROTOCOL_VERSION = 2
"""Incremented if the same encoder and images give other figures than before."""

PROTOCOLS = ("knn", "linear", "clustering", "few", "finetune", "corruptions")
"""All protocols; the first three are the default."""


def evaluate(
    encoder: Encoder | None,
    train: Source | Embeddings,
    test: Source | Embeddings,
    *,
    protocols: Sequence[str] = PROTOCOLS[:3],
    k: int = 200,
    temperature: float = 0.1,
    distance: str = "cosine",
    probe: str | Lbfgs | Sgd = "lbfgs",
    clusters: int | None = None,
    shares: Sequence[float] = SHARES,
    draws: int = 3,
    tuning: str | Finetune = "small",
    tuning_share: float = 1.0,
    most: int | None = 1000,
    seed: int = 0,
    batch: int = 512,
    precision: torch.dtype = torch.float32,
    workers: int = 0,
) -> dict[str, Any]:
    """Return the figures of each protocol with all settings needed to compare them, in JSON types.

    Clustering uses `test`. k is at most the number of labelled training images; the result states the k in use.

    Args:
        encoder: the encoder; may be None if train and test are embeddings.
        train: source of images, or embeddings.
        test: source of images, or embeddings. finetune and corruptions need the encoder and images.
        protocols: names in PROTOCOLS.
        k: number of neighbours of k-NN.
        temperature: of k-NN.
        distance: of k-NN.
        probe: see `linear_probe`.
        clusters: see `clustering`.
        shares: see `few`.
        draws: see `few`.
        tuning: settings of `finetune`.
        tuning_share: share of `finetune`.
        most: see `corruptions`.
        seed: seed of all draws.
        batch: images at a time.
        precision: of the encoder.
        workers: processes that decode images.

    Raises:
        ConfigError: for unknown protocols.
        DataError: without labels, with one class only, or if features are not finite.
    """
    unknown = set(protocols) - set(PROTOCOLS)
    if unknown:
        raise ConfigError(f"unknown protocols {sorted(unknown)}: choose from {', '.join(PROTOCOLS)}.")
    given: tuple[Any, Any, Any] = encoder, train, test
    if "finetune" in protocols:
        _need_images("finetune trains", *given)
    if "corruptions" in protocols:
        _need_images("corruptions are shown to", encoder, test)
        check(given[0])

    def features(data: Source | Embeddings) -> Embeddings:
        if isinstance(data, Embeddings):
            return data
        if encoder is None:
            raise ConfigError(f"{data.name} holds images, and there is no encoder to embed them.")
        return embed(encoder, data, batch=batch, precision=precision, workers=workers)

    sets = {"train": features(train), "test": features(test)}
    known: dict[str, Any] = {split: data.labelled() for split, data in sets.items()}
    class_count(known["train"], known["test"])
    device = encoder.device if encoder is not None else "cpu"
    near: dict[str, Any] = {"k": k, "temperature": temperature, "distance": distance}
    result: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        **{
            split: {"name": data.name, "images": len(data), "labelled": len(known[split])}
            | ({"unreadable": len(data.missing)} if data.missing else {})
            for split, data in sets.items()
        },
        "feature": sets["test"].feature,
        "width": sets["test"].vectors.shape[1],
        "encoder": _describe(encoder),
        "precision": str(precision).removeprefix("torch."),
        "versions": {name: version(name) for name in ("inbatch", "torch", "scikit-learn")},
    }
    if "knn" in protocols:
        result["knn"] = knn(**known, **near | {"k": min(k, len(known["train"]))}, device=device)
    if "linear" in protocols:
        result["linear"] = linear_probe(**known, probe=probe, seed=seed, device=device)
    if "clustering" in protocols:
        plain = known["test"] if test is sets["test"] else _plain(encoder, known["test"])
        told = {"split": "test"} | ({} if plain is known["test"] else {"features": "before whitening"})
        result["clustering"] = clustering(plain, clusters, seed=seed) | told
    if "few" in protocols:
        result["few"] = few(**known, shares=shares, draws=draws, probe=probe, seed=seed, device=device, **near)
    if "finetune" in protocols:
        result["finetune"] = finetune(*given, tuning, share=tuning_share, seed=seed, batch=batch, workers=workers)
    if "corruptions" in protocols:
        options: dict[str, Any] = near | {"probe": probe, "seed": seed, "batch": batch, "precision": precision}
        result["corruptions"] = corruptions(given[0], **known, source=given[2], most=most, **options)
    return result


def _need_images(what: str, encoder: Encoder | None, *data: Source | Embeddings) -> None:
    """Raise ConfigError unless there is an encoder, and the data are images."""
    if encoder is None:
        raise ConfigError(f"{what} an encoder, and there is none.")
    for one in data:
        if isinstance(one, Embeddings):
            raise ConfigError(
                f"{what} an encoder with images, and {one.name} holds embeddings: give a source of images."
            )


def _plain(encoder: Any, found: Embeddings) -> Embeddings:
    """Return the embeddings before whitening by the encoder, if any.

    Whitened features are spread equally in all directions, so that k-means finds no clusters in them.
    """
    readout = getattr(encoder, "readout", None)
    if readout is None or not int(readout.images):
        return found
    return replace(found, vectors=readout.unwhitened(found.vectors))


def _describe(encoder: Encoder | None) -> dict[str, Any] | None:
    if encoder is None:
        return None
    return {key: getattr(encoder, key, None) for key in ("name", "size", "channels", "stem", "mean", "std")}
