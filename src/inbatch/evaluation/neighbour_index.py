"""Approximate nearest neighbours: the rows are divided into lists, and a query is compared with the nearest lists.

The candidates come from an inverted file of faiss (IVF-Flat, extra `index`). Their similarities and their order are
those of exact search; only neighbours in lists that were not searched are missed (docs/after/search.md has the shares).
"""

import hashlib
import io
import math
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.errors import ConfigError
from inbatch.evaluation.neighbours import check, ordered, search, unit_rows
from inbatch.runtime.files import replacing
from inbatch.runtime.isolation import usual_numerics

PROBES = 32
"""Lists that are searched for each query."""

_POINTS, _ITERATIONS = 64, 8  # rows per list from which the centroids are computed, and iterations of k-means
_BLOCK = 1 << 16  # rows at a time
_QUERIES = 1 << 18  # queries at a time


def _library() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ConfigError('an approximate index needs faiss: `pip install "inbatch[index]"`, or use exact.') from error
    return faiss


@dataclass(frozen=True)
class NeighbourIndex:
    """An inverted file of features.

    Attributes:
        vectors: The features, for example memory-mapped.
        centroids: Centre of each list.
        lists: List of each row.
        searcher: The index of faiss.
    """

    vectors: Float[Tensor, "n f"]
    centroids: Float[Tensor, "l f"]
    lists: Int[Tensor, "n"]
    searcher: Any

    @classmethod
    @usual_numerics()
    def build(cls, vectors: Float[Tensor, "n f"]) -> "NeighbourIndex":
        """Return the index of features, divided into 2 sqrt(N) lists by k-means on a sample.

        Raises:
            ConfigError: If faiss is not installed.
            DataError: If a value is not finite.
        """
        faiss = _library()
        count = min(len(vectors), max(1, round(2 * math.sqrt(len(vectors)))))
        sample = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[: _POINTS * count].sort()
        means = faiss.Kmeans(
            vectors.shape[1], count, niter=_ITERATIONS, spherical=True, max_points_per_centroid=_POINTS,
            min_points_per_centroid=1, seed=0,
        )  # fmt: skip
        means.train(unit_rows(vectors[sample.values]).numpy())
        lists = torch.empty(len(vectors), dtype=torch.int32)
        for start in range(0, len(vectors), _BLOCK):
            _, nearest = means.index.search(unit_rows(vectors[start : start + _BLOCK]).numpy(), 1)
            lists[start : start + _BLOCK] = torch.from_numpy(nearest[:, 0])
        return cls._filled(vectors, torch.from_numpy(means.centroids), lists)

    @classmethod
    def _filled(cls, vectors: Tensor, centroids: Tensor, lists: Tensor) -> "NeighbourIndex":
        faiss = _library()
        coarse = faiss.IndexFlatIP(vectors.shape[1])
        coarse.add(centroids.numpy())
        searcher = faiss.IndexIVFFlat(coarse, vectors.shape[1], len(centroids), faiss.METRIC_INNER_PRODUCT)
        searcher.is_trained, searcher.nprobe = True, min(PROBES, len(centroids))
        for start in range(0, len(vectors), _BLOCK):
            rows = unit_rows(vectors[start : start + _BLOCK]).numpy()
            places = torch.arange(start, start + len(rows)).numpy()
            chosen = lists[start : start + _BLOCK].long().numpy()
            pointers = (faiss.swig_ptr(array) for array in (rows, places, chosen))
            searcher.add_core(len(rows), *pointers)
        return cls(vectors, centroids, lists, searcher)

    @usual_numerics()
    @torch.no_grad()
    def nearest(self, query: Float[Tensor, "q f"], k: int) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
        """Return similarities and positions as `inbatch.evaluation.neighbours.nearest`. Raises as it does."""
        check(k, len(self.vectors), query, self.vectors)
        _, places = self.searcher.search(unit_rows(query).numpy(), k)
        return self._completed(query, torch.from_numpy(places), k, None)

    @usual_numerics()
    @torch.no_grad()
    def nearest_others(self, k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """Return similarities and positions as `inbatch.evaluation.neighbours.nearest_others`. Raises as it does."""
        check(k, len(self.vectors) - 1, self.vectors, self.vectors)
        from faiss.contrib.big_batch_search import big_batch_search

        similarity, place = torch.empty(len(self.vectors), k), torch.empty(len(self.vectors), k, dtype=torch.long)
        for start in range(0, len(self.vectors), _QUERIES):
            query = self.vectors[start : start + _QUERIES]
            own = torch.arange(start, start + len(query))
            with redirect_stdout(io.StringIO()):  # it reports its progress there
                _, places = big_batch_search(self.searcher, unit_rows(query).numpy(), k + 1)
            others = torch.from_numpy(places).masked_fill_(torch.from_numpy(places) == own[:, None], -1)
            at = slice(start, start + len(query))
            similarity[at], place[at] = self._completed(query, others, k, own)
        return similarity, place

    def _completed(self, query: Tensor, places: Tensor, k: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the k nearest candidates; queries for which the lists hold fewer than k are searched exactly."""
        similarity, place = ordered(query, self.vectors, places, k)
        few = (place < 0).any(1).nonzero()[:, 0]
        if len(few):
            similarity[few], place[few] = search(query[few], self.vectors, k, None if own is None else own[few])
        return similarity, place

    def save(self, file: Path, key: str) -> None:
        """Write centroids and lists as safetensors; `key` identifies the features. InbatchError if it is impossible."""
        from safetensors.torch import save

        tensors = {"centroids": self.centroids.contiguous(), "lists": self.lists}
        with replacing(file) as out:
            out.write(save(tensors, {"format": "inbatch index 1", "key": key}))

    @classmethod
    def load(cls, file: Path, key: str, vectors: Float[Tensor, "n f"]) -> "NeighbourIndex | None":
        """Return a saved index of the features; None if the file is missing, damaged, or of other features."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as found:
                if (found.metadata() or {}).get("key") != key:
                    return None
                centroids, lists = found.get_tensor("centroids"), found.get_tensor("lists")
        except (OSError, SafetensorError):
            return None
        fits = centroids.ndim == 2 and centroids.shape[1] == vectors.shape[1] and lists.shape == (len(vectors),)
        if not fits or not 0 <= int(lists.min()) <= int(lists.max()) < len(centroids) or not centroids.isfinite().all():
            return None
        return cls._filled(vectors, centroids.float(), lists.int())


def fingerprint(vectors: Float[Tensor, "n f"]) -> str:
    """Return a string that changes with any number of the features."""
    digest = hashlib.sha256(str(tuple(vectors.shape)).encode())
    for rows in vectors.split(_BLOCK):
        digest.update(rows.contiguous().numpy().data)
    return digest.hexdigest()
