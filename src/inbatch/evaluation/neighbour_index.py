"""Approximate nearest neighbours: the rows are divided into lists, and a query is compared with the nearest lists.

An inverted file, searched list by list: all queries of a list are compared with its rows in one product, which is
several times faster for many queries than a search for each. k-means, the products and the heaps of the best are those
of faiss (extra `index`). The features are read where they are, so that an index consists only of the centroids and the
list of each row. Similarities and their order are those of exact search; only neighbours in lists that were not
searched are missed (docs/after/search.md has the shares).
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from inbatch.errors import ConfigError
from inbatch.evaluation.exact_search import check, ordered, search, unit_rows
from inbatch.evaluation.selected_rows import AnyRows
from inbatch.runtime.files import replacing
from inbatch.runtime.isolation import usual_numerics

PROBES = 32
"""Lists that are searched for each query."""

_POINTS, _ITERATIONS = 64, 8  # rows per list from which the centroids are computed, and iterations of k-means
_BLOCK = 1 << 16  # rows at a time
_QUERIES = 1 << 17  # queries at a time: 0.27 GB for 512 features


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
    """

    vectors: AnyRows
    centroids: Float[Tensor, "l f"]
    lists: Int[Tensor, "n"]

    @classmethod
    @usual_numerics()
    def build(cls, vectors: AnyRows) -> "NeighbourIndex":
        """Return the index of features, divided into 2 sqrt(N) lists by k-means on a sample.

        Raises:
            ConfigError: If faiss is not installed.
            DataError: If a value is not finite.
        """
        count = min(len(vectors), round(2 * math.sqrt(len(vectors))))
        sample = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[: _POINTS * count].sort()
        means = _library().Kmeans(
            vectors.shape[1], count, niter=_ITERATIONS, spherical=True, max_points_per_centroid=_POINTS,
            min_points_per_centroid=1, seed=0,
        )  # fmt: skip
        means.train(unit_rows(vectors[sample.values]).numpy())
        lists = torch.empty(len(vectors), dtype=torch.int32)
        for start in range(0, len(vectors), _BLOCK):
            _, near = means.index.search(unit_rows(vectors[start : start + _BLOCK]).numpy(), 1)
            lists[start : start + _BLOCK] = torch.from_numpy(near[:, 0])
        return cls(vectors, torch.from_numpy(means.centroids), lists)

    @cached_property
    def _members(self) -> tuple[Int[Tensor, "m"], ...]:
        """The rows of each list."""
        return self.lists.argsort(stable=True).split(self.lists.bincount(minlength=len(self.centroids)).tolist())

    @usual_numerics()
    @torch.no_grad()
    def nearest(self, query: Float[Tensor, "q g"], k: int) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
        """Return similarities and positions as `inbatch.evaluation.neighbours.nearest`. Raises as it does."""
        check(k, len(self.vectors), query, self.vectors)
        return self._search(query, k, None)

    @usual_numerics()
    @torch.no_grad()
    def nearest_others(self, k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """Return similarities and positions as `inbatch.evaluation.neighbours.nearest_others`. Raises as it does."""
        check(k, len(self.vectors) - 1, self.vectors, self.vectors)
        return self._search(self.vectors, k, torch.arange(len(self.vectors)))

    def _search(self, query: AnyRows, k: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
        similarity, place = torch.empty(len(query), k), torch.empty(len(query), k, dtype=torch.long)
        for at in torch.arange(len(query)).split(_QUERIES):
            places = self._candidates(unit_rows(query[at[0] : at[-1] + 1]), k + (own is not None))
            if own is not None:
                places.masked_fill_(places == own[at, None], -1)
            similarity[at], place[at] = ordered(query[at[0] : at[-1] + 1], self.vectors, places, k)
        few = (place < 0).any(1).nonzero()[:, 0]  # their lists hold fewer than k rows
        if len(few):
            similarity[few], place[few] = search(query[few], self.vectors, k, None if own is None else own[few])
        return similarity, place

    def _candidates(self, rows: Tensor, count: int) -> Tensor:
        """Return the positions of the nearest rows in the lists that are nearest to each query, -1 if there are few."""
        faiss, members = _library(), self._members
        heap = faiss.ResultHeap(len(rows), count, keep_max=True)
        for number, queries in self._queries_of_lists(rows):
            if not len(members[number]):
                continue
            bank = unit_rows(self.vectors[members[number]]).numpy()
            near, at = faiss.knn(rows[queries].numpy(), bank, min(count, len(bank)), metric=faiss.METRIC_INNER_PRODUCT)
            heap.add_result_subset(queries.numpy(), near, members[number].numpy()[at])
        heap.finalize()
        return torch.from_numpy(heap.I)

    def _queries_of_lists(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each list that is searched, and the queries for which it is."""
        probes = min(PROBES, len(self.centroids))
        _, lists = _library().knn(rows.numpy(), self.centroids.numpy(), probes, metric=_library().METRIC_INNER_PRODUCT)
        numbers = torch.from_numpy(lists).flatten()
        queries = numbers.argsort(stable=True).div(probes, rounding_mode="floor")
        parts = queries.split(numbers.bincount(minlength=len(self.centroids)).tolist())
        yield from ((number, part) for number, part in enumerate(parts) if len(part))

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
            with safe_open(file, "pt") as saved:
                if (saved.metadata() or {}).get("key") != key:
                    return None
                centroids, lists = saved.get_tensor("centroids"), saved.get_tensor("lists")
        except (OSError, SafetensorError):
            return None
        fits = centroids.ndim == 2 and centroids.shape[1] == vectors.shape[1] and lists.shape == (len(vectors),)
        if not fits or not 0 <= int(lists.min()) <= int(lists.max()) < len(centroids) or not centroids.isfinite().all():
            return None
        return cls(vectors, centroids.float(), lists.int())


def fingerprint(vectors: Float[Tensor, "n f"]) -> str:
    """Return a string that changes with any number of the features."""
    digest = hashlib.sha256(str(tuple(vectors.shape)).encode())
    for rows in vectors.split(_BLOCK):
        digest.update(rows.contiguous().numpy().data)
    return digest.hexdigest()
