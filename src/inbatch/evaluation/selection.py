"""Selection of the images to label next, from features: diverse, covering, typical, uncertain or random ones.

All strategies compare directions (cosine similarity) and read the vectors in tiles, so that they can be memory-mapped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from inbatch.errors import ConfigError, DataError, check_whole, many
from inbatch.evaluation.embeddings import Embeddings, check_finite
from inbatch.evaluation.linear_probe import fit
from inbatch.evaluation.neighbours import unit_rows
from inbatch.evaluation.typicality import typical_rows
from inbatch.nn.cpu_matmul import fast_products
from inbatch.rng import fold
from inbatch.runtime.isolation import usual_numerics

DEFAULT = "coverage"
"""Strategy if none is named: it wins most often over chance in docs/after/select.md."""
_TILE = 1 << 14
"""Rows that are read at a time."""
_ACTIVE = 1 << 14
"""Farthest rows from which `diverse` chooses until another row may be farther."""
_BATCH = 32
"""Candidates whose gain `coverage` computes at a time."""
_KEPT = 2 * 10**8
"""Similarities that `coverage` keeps in memory: 800 MB."""
WITNESSES, CANDIDATES = 10_000, 20_000
"""Largest numbers of images whose coverage is maximised, and of images that can be chosen for it."""
_PROBE = 50_000
"""Labelled images, at most, to which the probe of `uncertain` is fitted."""


@dataclass(frozen=True)
class Selection:
    """Chosen rows in the order of choice.

    Attributes:
        rows: (n,) int64, positions.
        values: (n,) float32, the quantity that the strategy compares, described by `measure`.
        reasons: One sentence for each row.
        measure: Description of `values`.
        notes: Sentences about sub-samples and ties.
    """

    rows: Int[Tensor, "n"]
    values: Float[Tensor, "n"]
    reasons: tuple[str, ...]
    measure: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class _Pool:
    """The images, which of them are labelled, and the seed."""

    vectors: Float[Tensor, "n f"]
    labelled: Bool[Tensor, "n"]
    labels: Int[Tensor, "n"] | None
    names: Sequence[str]
    generator: torch.Generator
    seed: int

    def free(self) -> Int[Tensor, "m"]:
        """Return the positions that can be chosen."""
        return (~self.labelled).nonzero()[:, 0]

    def sample(self, positions: Int[Tensor, "m"], most: int) -> Int[Tensor, "s"]:
        """Return at most this many of the positions, drawn by the seed, in their order."""
        if len(positions) <= most:
            return positions
        return positions[torch.randperm(len(positions), generator=self.generator)[:most].sort().values]

    def most_similar(self, rows: Float[Tensor, "m f"], others: Int[Tensor, "k"]) -> Float[Tensor, "m"]:
        """Return for each row the largest similarity to the images at the other positions; -1 without any."""
        best = torch.full((len(rows),), -1.0)
        for tile in others.split(2048) if len(others) else ():
            bank = unit_rows(self.vectors[tile])
            for at in torch.arange(len(rows)).split(2048):
                best[at] = torch.maximum(best[at], (rows[at] @ bank.T).amax(1))
        return best


@usual_numerics()
@torch.no_grad()
def select(
    vectors: Float[Tensor, "n f"],
    count: int,
    strategy: str = DEFAULT,
    *,
    labelled: Bool[Tensor, "n"] | None = None,
    labels: Int[Tensor, "n"] | None = None,
    names: Sequence[str] = (),
    seed: int = 0,
) -> Selection:
    """Return the rows to label next, in the order of choice.

    diverse: The row with the smallest similarity to all that are chosen or labelled (k-centre greedy; Sener and
    Savarese 2018). coverage: The row that increases the mean similarity of all rows to the nearest chosen one most
    (facility location, lazy greedy). typical: The densest row of each k-means cluster, large clusters without labels
    first (TypiClust; Hacohen et al. 2022). uncertain: The rows with the smallest margin between the two most probable
    classes of a linear probe on the labelled rows. random: Drawn by the seed.

    Args:
        vectors: Features, for example memory-mapped; they are compared by cosine similarity.
        count: Number of rows to choose.
        strategy: A name of `STRATEGIES`.
        labelled: Rows that are labelled already: they count as chosen, and are never chosen again.
        labels: Classes, of which `uncertain` uses those of the labelled rows.
        names: Names of the classes.
        seed: Seed of draws and of k-means.

    Raises:
        ConfigError: For an unknown strategy, or a count that is not in 1 to the number of unlabelled rows.
        DataError: If a feature is not finite, or if `uncertain` has labels of fewer than two classes.
    """
    if strategy not in STRATEGIES:
        raise ConfigError(f"unknown strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
    check_whole("the number of images to choose", count, least=1)
    check_finite(vectors)
    if labelled is None:
        labelled = torch.zeros(len(vectors), dtype=torch.bool)
    generator = torch.Generator().manual_seed(fold(seed, 20))
    pool = _Pool(vectors, labelled, labels, names, generator, seed)
    if count > (free := int((~labelled).sum())):
        if not free:
            raise ConfigError(
                f"all {len(vectors):,} images are labelled: there is none to choose (--labelled none: all)"
            )
        known = f" ({int(labelled.sum()):,} are labelled)" if labelled.any() else ""
        raise ConfigError(f"{many(count, 'image')} cannot be chosen from {free:,}{known}: choose at most {free:,}")
    with fast_products():
        return STRATEGIES[strategy](pool, count)


def _random(pool: _Pool, count: int) -> Selection:
    free = pool.free()
    rows = free[torch.randperm(len(free), generator=pool.generator)[:count]]
    return Selection(rows, torch.zeros(count), ("drawn by the seed",) * count, "none: drawn by the seed")


def _diverse(pool: _Pool, count: int) -> Selection:
    """Choose the farthest row, in rounds: between two passes over all rows, only the farthest ones are updated."""
    free = pool.free()
    known = pool.labelled.nonzero()[:, 0]
    nearest = torch.full((len(free),), -1.0)
    chosen, values = list[int](), list[float]()
    fresh = known
    if not len(known):
        chosen.append(int(torch.randint(len(free), (1,), generator=pool.generator)))
        values.append(torch.nan)
        nearest[chosen[0]] = torch.inf
        fresh = free[chosen]
    while len(chosen) < count:
        for at in torch.arange(len(free)).split(_TILE):
            nearest[at] = torch.maximum(nearest[at], pool.most_similar(unit_rows(pool.vectors[free[at]]), fresh))
        active = nearest.topk(min(_ACTIVE, len(free)), largest=False).indices.sort().values
        x, near = unit_rows(pool.vectors[free[active]]), nearest[active]
        limit = near.max() if len(active) < len(free) else torch.inf  # no other row is farther
        begin = len(chosen)
        while len(chosen) < count:
            i = int(near.argmin())
            if len(chosen) > begin and near[i] > limit:
                break
            values.append(max(0.0, 1 - near[i].item()))
            chosen.append(int(active[i]))
            near = torch.maximum(near, x @ x[i])
            near[i] = nearest[active[i]] = torch.inf
        fresh = free[chosen[begin:]]
    reasons = [f"distance {value:.3f} to the nearest chosen or labelled image" for value in values]
    if not len(known):
        reasons[0] = "the first image, drawn by the seed"
    same = sum(value < 1e-6 for value in values)
    notes = (f"the features of {many(same, 'chosen image')} equal those of another image",) if same else ()
    measure = "cosine distance to the nearest chosen or labelled image"
    return Selection(free[chosen], torch.tensor(values).nan_to_num(2.0), tuple(reasons), measure, notes)


def _coverage(pool: _Pool, count: int) -> Selection:
    """Maximise the facility location function of a sample, by lazy greedy: gains only fall, so old ones are bounds."""
    free = pool.free()
    candidates = pool.sample(free, max(CANDIDATES, 2 * count))
    witnesses = unit_rows(pool.vectors[pool.sample(free, min(WITNESSES, _KEPT // len(candidates)))])
    x = unit_rows(pool.vectors[candidates])
    best = pool.most_similar(witnesses, pool.labelled.nonzero()[:, 0])
    covered, similarity = best.mean().item(), x @ witnesses.T

    def gains(at: Tensor) -> Tensor:
        return (similarity[at] - best).clamp_(min=0).mean(1)

    bound = torch.cat([gains(at) for at in torch.arange(len(x)).split(1024)])
    step = torch.zeros(len(x), dtype=torch.long)  # number of chosen rows that the bound takes into account
    chosen, values, reasons = list[int](), list[float](), list[str]()
    while len(chosen) < count:
        top = bound.topk(min(_BATCH, len(bound))).indices
        if step[top[0]] < len(chosen):
            old = top[(step[top] < len(chosen)) & (bound[top] > -torch.inf)]  # chosen ones stay chosen
            bound[old], step[old] = gains(old), len(chosen)
            continue
        row = int(top[0])
        chosen.append(row)
        values.append(bound[row].item())
        bound[row] = -torch.inf
        best = torch.maximum(best, similarity[row])
        before, covered = covered, best.mean().item()
        if before == -1:  # nothing was chosen or labelled
            reasons.append(f"the image most similar to all others, {covered:.4f} on average")
            continue
        reasons.append(f"raises the mean similarity to the nearest chosen image from {before:.4f} to {covered:.4f}")
    notes = []
    if len(witnesses) < len(free):
        drawn = f"{len(x):,} candidates and " if len(x) < len(free) else ""
        notes = [f"coverage of {len(free):,} images is estimated by {drawn}{len(witnesses):,} images drawn by the seed"]
    measure = "increase of the mean similarity of the images to the nearest chosen one"
    return Selection(candidates[chosen], torch.tensor(values), tuple(reasons), measure, tuple(notes))


def _typical(pool: _Pool, count: int) -> Selection:
    rows, values, cluster, size = typical_rows(pool.vectors, pool.labelled, count, pool.seed)
    pairs = zip(cluster.tolist(), size.tolist(), strict=True)
    reasons = tuple(f"dense centre of cluster {number} ({many(images, 'image')})" for number, images in pairs)
    return Selection(rows, values, reasons, "mean similarity to the nearest images of its cluster")


def _uncertain(pool: _Pool, count: int) -> Selection:
    labels = pool.labels if pool.labels is not None else torch.full((len(pool.vectors),), -1)
    known = (pool.labelled & (labels >= 0)).nonzero()[:, 0]
    if len(labels[known].unique()) < 2:
        raise DataError(
            f"the strategy uncertain needs labelled images of two classes at least, not {many(len(known), 'image')} of "
            f"{len(labels[known].unique())}: pass them with --labelled, or choose another strategy"
        )
    known = pool.sample(known, _PROBE)
    present, target = labels[known].unique(return_inverse=True)
    rows = Embeddings(pool.vectors[known], target, ("",) * len(known), "labelled", "")
    probe, free = fit(rows, len(present)), pool.free()
    margin, pair, chance = (
        torch.empty(len(free)),
        torch.empty(len(free), 2, dtype=torch.long),
        torch.empty(len(free), 2),
    )
    for at in torch.arange(len(free)).split(_TILE):
        top = probe.scores(pool.vectors[free[at]]).softmax(1).topk(2, dim=1)
        chance[at], pair[at], margin[at] = top.values, top.indices, top.values[:, 0] - top.values[:, 1]
    chosen = margin.argsort(stable=True)[:count]

    def name(number: int) -> str:
        label = int(present[number])
        return pool.names[label] if label < len(pool.names) else str(label)

    reasons = tuple(
        f"probably {name(a)} ({p:.2f}) or {name(b)} ({q:.2f})"
        for (a, b), (p, q) in zip(pair[chosen].tolist(), chance[chosen].tolist(), strict=True)
    )
    measure = "margin between the two largest probabilities of a linear probe; small ones first"
    return Selection(free[chosen], margin[chosen], reasons, measure)


STRATEGIES: dict[str, Callable[[_Pool, int], Selection]] = {
    "diverse": _diverse,
    "coverage": _coverage,
    "typical": _typical,
    "uncertain": _uncertain,
    "random": _random,
}
"""Strategies of `select`."""
