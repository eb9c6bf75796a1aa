"""Evaluation: an encoder and two data sets in, numbers with their protocol out. It knows no method."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from inbatch.errors import ConfigError
from inbatch.evaluate.clustering import ari, assigned, clustering, hungarian_accuracy, nmi
from inbatch.evaluate.embed import Encoder, Kept, Source, embed, embed_stream, keep, raw_pixels, readable
from inbatch.evaluate.embeddings import Embeddings, class_count
from inbatch.evaluate.knn import knn, knn_scores
from inbatch.evaluate.linear import PROBES, Lbfgs, Sgd, linear
from inbatch.evaluate.spectrum import feature_std, rankme
from inbatch.evaluate.write import write_embeddings

__all__ = [
    "PROBES",
    "PROTOCOL_VERSION",
    "Embeddings",
    "Kept",
    "Lbfgs",
    "Sgd",
    "ari",
    "assigned",
    "clustering",
    "embed",
    "embed_stream",
    "evaluate",
    "feature_std",
    "hungarian_accuracy",
    "keep",
    "knn",
    "knn_scores",
    "linear",
    "nmi",
    "rankme",
    "raw_pixels",
    "readable",
    "write_embeddings",
]

PROTOCOL_VERSION = 2
"""Raised whenever the same encoder and images would give other numbers than before."""


def evaluate(
    encoder: Encoder | None,
    train: Source | Embeddings,
    test: Source | Embeddings,
    *,
    protocols: Sequence[str] = ("knn", "linear", "clustering"),
    k: int = 200,
    temperature: float = 0.1,
    distance: str = "cosine",
    probe: str | Lbfgs | Sgd = "lbfgs",
    clusters: int | None = None,
    seed: int = 0,
    batch: int = 512,
    precision: torch.dtype = torch.float32,
    workers: int = 0,
) -> dict[str, Any]:
    """The figures of each protocol with all that is needed to compare them, fit for JSON; clustering is of `test`.

    train, test: sources of images, or embeddings made before (the encoder may then be None).
    k is capped by the number of labelled training images; the result states the k that was used.
    ConfigError for unknown protocols; DataError without labels, with one class only, or features that are not finite.
    """
    unknown = set(protocols) - {"knn", "linear", "clustering"}
    if unknown:
        raise ConfigError(f"unknown protocols {sorted(unknown)}: choose from knn, linear, clustering.")

    def features(data: Source | Embeddings) -> Embeddings:
        if isinstance(data, Embeddings):
            return data
        if encoder is None:
            raise ConfigError(f"{data.name} holds images, and there is no encoder to embed them.")
        return embed(encoder, data, batch=batch, precision=precision, workers=workers)

    sets = {"train": features(train), "test": features(test)}
    known = {split: data.labelled() for split, data in sets.items()}
    class_count(known["train"], known["test"])
    device = encoder.device if encoder is not None else "cpu"
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
        nearest = min(k, len(known["train"]))
        result["knn"] = knn(**known, k=nearest, temperature=temperature, distance=distance, device=device)
    if "linear" in protocols:
        result["linear"] = linear(**known, probe=probe, seed=seed, device=device)
    if "clustering" in protocols:
        result["clustering"] = {**clustering(known["test"], clusters, seed=seed), "split": "test"}
    return result


def _describe(encoder: Encoder | None) -> dict[str, Any] | None:
    if encoder is None:
        return None
    return {key: getattr(encoder, key, None) for key in ("name", "size", "channels", "stem", "mean", "std")}
