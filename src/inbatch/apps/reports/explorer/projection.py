"""Maps of features: two coordinates per image by PCA, t-SNE, UMAP or PaCMAP."""

import io
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from inbatch.errors import ConfigError
from inbatch.evaluation.neighbours import unit_rows

_WIDTH = 50
"""Principal components that t-SNE, UMAP and PaCMAP get: distances of more are dominated by noise and take longer."""
_FEWEST = 10
"""With fewer different images, neighbourhoods are too small for anything but PCA."""
TSNE_LIMIT = 10_000
"""Images up to which `auto` uses t-SNE: its time grows faster than their number (docs/after/explore.md)."""


def choose_projection(name: str, count: int) -> tuple[str, str]:
    """Return the projection for a number of images, and the reason.

    Args:
        name: pca, tsne, umap, pacmap, or auto for the best one that is installed and takes minutes at most.
        count: Number of images.

    Raises:
        ConfigError: If the projection is unknown, or its library is not installed.
    """
    if name in _EXTRAS and find_spec(_EXTRAS[name]) is None:
        library = _EXTRAS[name].replace("_", "-")
        raise ConfigError(f'--projection {name} needs {library}: pip install "inbatch[explore]"')
    if name != "auto":
        if name not in _PROJECTIONS:
            raise ConfigError(f"unknown projection {name!r}: choose one of auto, {', '.join(_PROJECTIONS)}")
        return name, "as requested"
    if count < _FEWEST:
        return "pca", f"there are fewer than {_FEWEST} images"
    if find_spec("pacmap"):
        return "pacmap", "it is installed and the fastest that keeps neighbourhoods"
    if count <= TSNE_LIMIT:
        return "tsne", f"PaCMAP is not installed, and t-SNE takes minutes for up to {TSNE_LIMIT:,} images"
    if find_spec("umap"):
        return "umap", f"PaCMAP is not installed, and t-SNE takes too long for more than {TSNE_LIMIT:,} images"
    return "pca", (
        f"t-SNE takes too long for more than {TSNE_LIMIT:,} images; a map that keeps neighbourhoods needs PaCMAP: "
        'pip install "inbatch[explore]"'
    )


def project(vectors: Float[Tensor, "n f"], name: str, seed: int) -> Float[Tensor, "n 2"]:
    """Return coordinates in [-1, 1] of the L2-normalised features, with one scale for both axes.

    Args:
        vectors: The features.
        name: A projection, not auto.
        seed: Seed of the projection; the same seed, features and library give the same map on one machine.

    Raises:
        DataError: If a feature is not finite.
    """
    rows = unit_rows(vectors)
    components = _principal(rows, min(_WIDTH, *rows.shape))
    different = len(torch.unique(components[: 10 * _FEWEST], dim=0)) if len(rows) > 1 else 1
    if name == "pca" or different < min(_FEWEST, len(rows)) or len(rows) < _FEWEST:
        flat = components[:, :2]
        places = torch.nn.functional.pad(flat, (0, 2 - flat.shape[1]))
    else:
        # Libraries print and warn about threads and the seed, on which the user cannot act.
        with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            places = torch.from_numpy(np.array(_PROJECTIONS[name](components.numpy(), seed), np.float32))
    return _scaled(places)


def _principal(rows: Tensor, width: int) -> Tensor:
    """Return the first principal components, each with the sign that makes its largest value positive."""
    centred = rows - rows.mean(0)
    values, directions = torch.linalg.eigh(centred.T.double() @ centred.double())
    kept = (values.flip(0)[:width] > 1e-12 * max(1.0, float(values[-1]))).float()
    flat = (centred @ directions.flip(1)[:, :width].float()) * kept
    largest = flat.gather(0, flat.abs().argmax(0, keepdim=True))
    return flat * torch.where(largest < 0, -1.0, 1.0)


def _scaled(places: Tensor) -> Tensor:
    low, high = places.amin(0), places.amax(0)
    half = float((high - low).max()) / 2
    return (places - (low + high) / 2) / (half if half > 0 else 1.0)


def _tsne(rows: np.ndarray, seed: int) -> Any:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(rows) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=seed, n_jobs=-1).fit_transform(rows)


def _umap(rows: np.ndarray, seed: int) -> Any:
    from umap import UMAP

    return UMAP(n_neighbors=min(15, len(rows) - 1), random_state=seed).fit_transform(rows)


def _pacmap(rows: np.ndarray, seed: int) -> Any:
    from pacmap import PaCMAP

    logging.getLogger("pacmap").setLevel(logging.ERROR)  # it warns that a seed was requested
    return PaCMAP(n_neighbors=min(10, len(rows) - 1), random_state=seed, apply_pca=False).fit_transform(
        rows, init="pca"
    )


def _pca(rows: np.ndarray, seed: int) -> Any:
    return rows[:, :2]


_PROJECTIONS: dict[str, Callable[[np.ndarray, int], Any]] = {
    "pca": _pca, "tsne": _tsne, "umap": _umap, "pacmap": _pacmap,
}  # fmt: skip
_EXTRAS = {"umap": "umap", "pacmap": "pacmap"}
"""Projection -> the module of a library that is not a core dependency."""
