"""Pass the rows of the whole data set to the method, and those of the features to the sampler, before an epoch."""

from typing import Any

import torch
from torch import Tensor

from inbatch.data import Subset
from inbatch.evaluation import embed
from inbatch.evaluation.neighbours import nearest_others
from inbatch.nn.clustering import k_means
from inbatch.rng import fold
from inbatch.runtime import distributed
from inbatch.training.build import RunComponents
from inbatch.training.head_evaluation import HeadRows

ITERATIONS = 20
"""Iterations of k-means for the clusters of a sampler."""


def surveyed(built: RunComponents, epoch: int) -> bool:
    """Return whether the method or the sampler needs the rows of all images before this epoch."""
    sampler = built.loader.sampler
    return built.method.surveys(epoch) or (sampler is not None and sampler.observes(epoch))


def survey(built: RunComponents, epoch: int) -> dict[str, float]:
    """Pass the rows of all images to the method and the features to the sampler, if they need them before this epoch.

    Clean images, in evaluation mode, split over the ranks. Returns numbers for the log.
    """
    figures: dict[str, float] = {}
    if built.method.surveys(epoch):
        network = built.target or built.network
        rows = {name: _rows_of_all(built, HeadRows(network, built.encoder, name)) for name in network.reads}
        labels = built.loader.source.labels.cpu()
        figures = built.method.survey(rows, labels, epoch, distributed.distribute_tasks)
    sampler = built.loader.sampler
    if sampler is not None and sampler.observes(epoch):
        with built.gathered():
            features, numbers = _rows_of_all(built, built.encoder), None
        if distributed.rank() == 0:
            if sampler.clusters:
                numbers = k_means(features, sampler.clusters, 1, ITERATIONS, fold(built.recipe.seed, epoch))[1]
            else:
                numbers = nearest_others(features, sampler.neighbours)[1]
        sampler.observe(distributed.broadcast_object(numbers))
    return figures


def _rows_of_all(built: RunComponents, model: Any) -> Tensor:
    """Return the rows (N, D) of a model for all images that the run learns from, computed in parts by the ranks."""
    source, world = built.loader.source, distributed.world()
    n = len(source)
    numbers = torch.arange(distributed.rank(), n + -n % world, world) % n  # the same number on every rank
    seen = Subset(source, numbers, "this rank's share")
    embeddings = embed(model, seen, workers=built.loader.workers)
    # An unreadable image is never used for learning, so its row is arbitrary; here it is that of the following image.
    share = embeddings.vectors[
        torch.searchsorted(embeddings.index, torch.arange(len(seen))).clamp(max=len(embeddings) - 1)
    ]
    whole = distributed.gather(share.to(built.loader.device)[:, None], dim=1).flatten(0, 1)
    # Rank r has the images r, r + world, ...; they are interleaved again.
    return whole[:n].cpu()
