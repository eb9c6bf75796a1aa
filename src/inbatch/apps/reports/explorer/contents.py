"""The data of the page: names, numbers and arrays, ready for JSON."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from inbatch.apps.collection.features import Collection
from inbatch.apps.reports.explorer.facts import Facts, common_neighbours
from inbatch.apps.reports.explorer.page import packed, smallest, split_root

_CHANGED = 200
"""Images that the list of the most changed neighbours holds."""


def page_data(
    first: Collection, facts: list[Facts], names: list[str], projection: str, groups: Int[Tensor, "n"] | None
) -> dict[str, Any]:
    """Return what the script of the page reads, without the thumbnails.

    Args:
        first: The images, whose absolute paths are used if they have files of their own.
        facts: One or two sets of facts about them.
        names: Name of each set.
        projection: Name of the projection.
        groups: Group of near duplicates of each image, 0 without one; None if they are unknown.
    """
    files = [first.file_of(i) for i in range(len(first))] if first.has_images else [None]
    paths = list(first.paths) if None in files else [str(file) for file in files]
    root, rest = split_root(paths)
    splits = list(dict.fromkeys(first.splits))
    place = {name: i for i, name in enumerate(splits)}
    labelled = bool((first.labels >= 0).any())
    data: dict[str, Any] = {
        "count": len(first),
        "k": facts[0].neighbours.shape[1],
        "root": root,
        "paths": rest,
        "classes": list(first.classes) if labelled else [],
        "labels": packed(smallest((first.labels + 1).numpy())) if labelled else None,
        "splits": splits,
        "split": packed(smallest(np.array([place[name] for name in first.splits]))),
        "groups": None if groups is None else packed(smallest(groups.numpy())),
        "maps": [_map_data(one, name, projection) for one, name in zip(facts, names, strict=True)],
    }
    if len(facts) == 2:
        common = common_neighbours(facts[0].neighbours, facts[1].neighbours)
        data["shared"] = packed(smallest(common.numpy()))
        data["changed"] = common.argsort(stable=True)[:_CHANGED].tolist()
    return data


def _map_data(facts: Facts, name: str, projection: str) -> dict[str, Any]:
    x, y = facts.places.float().numpy().T
    return {
        "name": name,
        "projection": projection,
        "x": packed(x),
        "y": packed(y),
        "neighbours": packed(smallest(facts.neighbours.numpy())),
        "similarities": packed((facts.similarities.clamp(0, 1) * 255).round().to(torch.uint8).numpy()),
        "clusters": packed(smallest(facts.clusters.numpy())),
        "clusterNames": list(facts.cluster_names),
        "outliers": packed(facts.outliers.float().numpy()),
    }
