"""What a run computes besides plain steps, for the plan of a time budget: curated views, surveys of the data set."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inbatch.data import Subset
from inbatch.evaluation import embed
from inbatch.evaluation.neighbours import nearest_others
from inbatch.nn.clustering import k_means
from inbatch.runtime import distributed
from inbatch.runtime.spacing import spaced
from inbatch.training.build import RunComponents
from inbatch.training.survey import ITERATIONS, surveyed

_IMAGES, _ROWS = 128, 1024
"""Images that are embedded, and rows that are clustered or compared, to estimate the duration of a survey."""


@dataclass(frozen=True)
class ExtraPasses:
    """Duration of what a run computes besides plain steps.

    Attributes:
        plain: Cost of a step without curation, relative to one with it; 1 for a run without curation.
        survey: Seconds of a survey; 0 for a run without surveys.
    """

    plain: float = 1.0
    survey: float = 0.0


def run_seconds(built: RunComponents, steps: int, per_step: float, extra: ExtraPasses) -> float:
    """Return the seconds of a run of so many steps, of which each takes `per_step` seconds with curation, if any."""
    per_epoch, curator = built.loader.steps, built.step.curator
    epochs = -(-steps // per_epoch)
    plain = 0 if curator is None else min(steps, curator.first_epoch(epochs) * per_epoch)
    surveys = sum(surveyed(built, epoch) for epoch in range(epochs)) if extra.survey else 0
    return per_step * (steps - plain * (1 - extra.plain)) + surveys * extra.survey


def fitting_steps(built: RunComponents, seconds: float, per_step: float, extra: ExtraPasses) -> int:
    """Return the number of steps of the longest run that takes at most so many seconds, surveys included."""
    least, most = 0, int(seconds / per_step / extra.plain)
    while extra != ExtraPasses() and least < most:
        middle = -(-(least + most) // 2)
        if run_seconds(built, middle, per_step, extra) <= seconds:
            least = middle
        else:
            most = middle - 1
    return most


def survey_seconds(built: RunComponents) -> float:
    """Return about how long a survey of the data set takes, 0 for a run without surveys.

    A few images are embedded; smaller problems of clustering and of neighbours are solved, and scaled to all images.
    """
    sampler, clusterings = built.loader.sampler, list(built.method.survey_clusterings())
    for_sampler = sampler is not None and bool(sampler.neighbours or sampler.clusters)
    if not clusterings and not for_sampler:
        return 0.0
    source, n = built.loader.source, len(built.loader.source)
    part = Subset(source, spaced(n, _IMAGES), "timed")
    with built.gathered():
        embed(built.encoder, part, workers=built.loader.workers)
        began = time.perf_counter()
        rows = embed(built.encoder, part, workers=built.loader.workers).vectors
    passes = bool(clusterings) + for_sampler
    seconds = (time.perf_counter() - began) * n / len(part) * passes / distributed.world()
    seconds += sum(_clustering(n, rows.shape[1], *one) for one in clusterings) / _shared(len(clusterings))
    if sampler is not None and sampler.clusters:
        seconds += _clustering(n, rows.shape[1], sampler.clusters, 1, ITERATIONS)
    elif sampler is not None and sampler.neighbours:
        count = min(n, _ROWS)
        began = time.perf_counter()
        nearest_others(_some_rows(count, rows.shape[1]), min(sampler.neighbours, count - 1))
        seconds += (time.perf_counter() - began) * (n / count) ** 2
    return seconds


def _clustering(n: int, width: int, clusters: int, restarts: int, iterations: int) -> float:
    """Return the seconds of k-means of n rows, from as many rows per cluster with fewer rows."""
    rows = min(n, _ROWS)
    count = max(2, round(clusters * rows / n))
    data = _some_rows(rows, width)
    began = time.perf_counter()
    k_means(data, count, restarts, iterations, 0)
    return (time.perf_counter() - began) * (n / rows) * (clusters / count)


def _some_rows(n: int, width: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(0))


def _shared(tasks: int) -> int:
    """Return how many ranks work on so many tasks at the same time."""
    return max(1, min(tasks, distributed.world()))


def combined(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the products of two costs of steps, each given as [(end as a share of the run, cost until there)]."""

    def cost(costs: Sequence[tuple[float, float]], at: float) -> float:
        return next((cost for end, cost in costs if at < end), 1.0)

    ends = sorted({end for end, _ in (*a, *b)})
    return [(end, cost(a, start) * cost(b, start)) for start, end in zip([0.0, *ends], ends, strict=False)]
