"""Evaluation of an encoder on two data sets: figures with their protocol, independent of the method."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch

from inbatch.errors import ConfigError
from inbatch.evaluation.accuracy import class_name
from inbatch.evaluation.clustering import clustering
from inbatch.evaluation.corruptions import check, corruptions
from inbatch.evaluation.embed import Encoder, Source, as_source, check_encoder, embed
from inbatch.evaluation.embeddings import Embeddings, check_one_label, matched, matched_labels
from inbatch.evaluation.few_labels import SHARES, evaluate_few_labels
from inbatch.evaluation.finetune import Finetune, finetune
from inbatch.evaluation.knn import check_neighbours, knn
from inbatch.evaluation.linear_probe import linear_probe
from inbatch.evaluation.probe_presets import Lbfgs, Sgd
from inbatch.evaluation.retrieval import retrieval
from inbatch.runtime.isolation import isolated

PROTOCOL_VERSION = 3
"""Incremented if the same encoder and images give other figures than before."""

PROTOCOLS = ("knn", "linear", "clustering", "retrieval", "few", "finetune", "corruptions")
"""All protocols; the first three are the default."""


@isolated
def evaluate(
    encoder: Any,
    train: Any,
    test: Any,
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

    Clustering and retrieval use `test`. k is at most the number of labelled training images; the result states it.
    Classes are matched by their names if train and test have names; test images of some of the classes are enough.
    k-NN, linear probe and fine-tuning have "balanced" and "per_class" accuracy in addition to top1 and top5.

    Args:
        encoder: the encoder; may be None if train and test are embeddings.
        train: embeddings, or images: a source, or what `open_data` opens.
        test: embeddings, or images. finetune and corruptions need the encoder and images.
        protocols: names in PROTOCOLS.
        k: number of neighbours of k-NN.
        temperature: of k-NN, above 0.
        distance: of k-NN.
        probe: see `linear_probe`.
        clusters: see `clustering`.
        shares: see `evaluate_few_labels`.
        draws: see `evaluate_few_labels`.
        tuning: settings of `finetune`.
        tuning_share: share of `finetune`.
        most: see `corruptions`.
        seed: seed of all draws.
        batch: images at a time.
        precision: of the encoder.
        workers: processes that decode images.

    Raises:
        ConfigError: for unknown protocols, for settings of k-NN that are out of range, or something else than an
            encoder.
        DataError: for data that cannot be opened, without labels, with several labels per image, with one training
            class only, if `test` has classes whose names `train` does not have, or if features are not finite.
    """
    if encoder is not None:
        check_encoder(encoder)
    train, test = (data if isinstance(data, Embeddings) else as_source(data, encoder) for data in (train, test))
    _check_protocols(protocols, encoder, train, test)
    check_neighbours(min(k, len(train)), len(train), temperature, distance)
    for data in (train, test):
        check_one_label(data.labels, data.name)
    matched_labels(train, test)
    features = [
        data if isinstance(data, Embeddings) else _embedded(encoder, data, batch, precision, workers)
        for data in (train, test)
    ]
    bank, queries, _ = matched(*features)
    labelled = bank, queries
    device = encoder.device if encoder is not None else "cpu"
    neighbours: dict[str, Any] = {"k": k, "temperature": temperature, "distance": distance}
    result = _conditions(encoder, features, labelled, precision)
    if "knn" in protocols:
        result["knn"] = knn(*labelled, **neighbours | {"k": min(k, len(bank))}, device=device)
    if "linear" in protocols:
        result["linear"] = linear_probe(*labelled, probe, seed=seed, device=device)
    if "clustering" in protocols:
        plain = queries if isinstance(test, Embeddings) else _plain(encoder, queries)
        unwhitened = {} if plain is queries else {"features": "before whitening"}
        result["clustering"] = clustering(plain, clusters, seed=seed) | {"split": "test"} | unwhitened
    if "retrieval" in protocols:
        result["retrieval"] = retrieval(queries) | {"split": "test"}
    if "few" in protocols:
        result["few"] = evaluate_few_labels(
            *labelled, shares=shares, draws=draws, probe=probe, seed=seed, device=device, **neighbours
        )
    if "finetune" in protocols:
        network, sources = _with_images(FINETUNE, encoder, train, test)
        result["finetune"] = finetune(
            network, sources[0], sources[1], tuning, share=tuning_share, seed=seed, batch=batch, workers=workers
        )
    if "corruptions" in protocols:
        network, sources = _with_images(CORRUPT, encoder, test)
        options: dict[str, Any] = neighbours | {"probe": probe, "seed": seed, "batch": batch, "precision": precision}
        result["corruptions"] = corruptions(network, *labelled, sources[0], most=most, **options)
    return result


FINETUNE, CORRUPT = "finetune trains", "corruptions are shown to"
"""What the protocols that need images do with an encoder, for messages."""


def _check_protocols(
    protocols: Sequence[str], encoder: Encoder | None, train: Source | Embeddings, test: Source | Embeddings
) -> None:
    """Raise ConfigError for unknown protocols, and for those that need an encoder or images that are not there."""
    unknown = set(protocols) - set(PROTOCOLS)
    if unknown:
        raise ConfigError(f"unknown protocols {sorted(unknown)}: choose from {', '.join(PROTOCOLS)}.")
    if "finetune" in protocols:
        _with_images(FINETUNE, encoder, train, test)
    if "corruptions" in protocols:
        check(_with_images(CORRUPT, encoder, test)[0])


def _with_images(use: str, encoder: Encoder | None, *data: Source | Embeddings) -> tuple[Encoder, list[Source]]:
    """Return the encoder and the sources; raise ConfigError without an encoder, or for embeddings."""
    if encoder is None:
        raise ConfigError(f"{use} an encoder, and there is none: pass encoder.")
    sources: list[Source] = []
    for one in data:
        if isinstance(one, Embeddings):
            raise ConfigError(
                f"{use} an encoder with images, and {one.name} holds embeddings: give a source of images."
            )
        sources.append(one)
    return encoder, sources


def _embedded(encoder: Encoder | None, source: Source, batch: int, precision: torch.dtype, workers: int) -> Embeddings:
    """Return the embeddings of a source; raise ConfigError without an encoder."""
    if encoder is None:
        raise ConfigError(f"{source.name} holds images, and there is no encoder to embed them: pass encoder.")
    return embed(encoder, source, batch=batch, precision=precision, workers=workers)


def _conditions(
    encoder: Encoder | None, features: Sequence[Embeddings], labelled: Sequence[Embeddings], precision: torch.dtype
) -> dict[str, Any]:
    """Return the part of the result that does not depend on the protocols."""
    return {
        "protocol_version": PROTOCOL_VERSION,
        "train": _counts(features[0], len(labelled[0])),
        "test": _counts(features[1], len(labelled[1])) | {"per_class": _images_per_class(labelled[1])},
        "feature": features[1].feature,
        "width": features[1].vectors.shape[1],
        "encoder": _describe(encoder),
        "precision": str(precision).removeprefix("torch."),
        "versions": {name: version(name) for name in ("inbatch", "torch", "scikit-learn")},
    }


def _counts(data: Embeddings, labelled: int) -> dict[str, Any]:
    """Return the name and the numbers of images of a data set."""
    unreadable = {"unreadable": len(data.missing)} if data.missing else {}
    return {"name": data.name, "images": len(data), "labelled": labelled} | unreadable


def _images_per_class(labelled: Embeddings) -> dict[str, int]:
    """Return the number of images of each class that occurs, by its name."""
    counts = labelled.labels.bincount().tolist()
    return {class_name(i, labelled.classes): count for i, count in enumerate(counts) if count}


def _plain(encoder: Any, embeddings: Embeddings) -> Embeddings:
    """Return the embeddings before whitening by the encoder, if any.

    Whitened features are spread equally in all directions, so that k-means finds no clusters in them.
    """
    readout = getattr(encoder, "readout", None)
    if readout is None or not int(readout.images):
        return embeddings
    return replace(embeddings, vectors=readout.unwhitened(embeddings.vectors))


def _describe(encoder: Encoder | None) -> dict[str, Any] | None:
    if encoder is None:
        return None
    return {key: getattr(encoder, key, None) for key in ("name", "size", "channels", "stem", "mean", "std")}
