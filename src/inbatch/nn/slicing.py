"""Distribution of rows along random directions: SIGReg's test of normality, and VISReg's distance to the normal one.

A test of N samples along K directions has N x K terms (times 17 points for SIGReg). Directions are computed in chunks,
with their gradient, so that none of these arrays is held; ranks share the directions and add up their results. If each
rank holds its own rows, SIGReg adds up the characteristic functions, and the projections that VISReg sorts are of the
gathered rows.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from inbatch.nn.batch_sums import batch_count, batch_sum, loss_sum, own_rows, own_share, replicated, whole
from inbatch.nn.functional import normalize, product, wide
from inbatch.nn.logsumexp import using
from inbatch.rng import head, uniform_from_hash

VIEW = -2
"""View in the key of the directions; views are 0, 1, ..., and -1 is that of W-MSE's sub-batches."""
CHUNK = 2**18
"""Projections of one chunk on a CPU, where their complex exponentials stay in its cache; 64 times as many on a GPU."""
_PHASE = 2.0**10
"""From this number over the relative precision on, the phase of a projection is arbitrary: the result is nan."""

Test = Callable[[Float[Tensor, "v n k"]], tuple[Float[Tensor, ""], Float[Tensor, "v n k"]]]
"""Projections -> the sum of the test over views and directions, and its gradient."""


def random_directions(
    width: int, count: int, step: int | Int[Tensor, ""] = 0, seed: int = 0, device: torch.device | str | None = None
) -> Float[Tensor, "d k"]:
    """Return directions that are uniform on the sphere, a pure function of seed and step: equal on every rank.

    Args:
        width: D.
        count: K.
        step: number of the step; a tensor on the device causes no synchronisation.
        seed: seed of the run.
        device: device of the directions.

    Returns:
        Unit columns in float64.
    """
    half = (width + 1) // 2
    place = torch.arange(count, device=device)
    length, turn = uniform_from_hash(head(seed, 0, VIEW, step), place, 2 * half).double().split(half, 1)
    length, turn = (-2 * (1 - length).log()).sqrt(), 2 * math.pi * turn  # Box and Muller: pairs of normal numbers
    return normalize(torch.cat([length * turn.cos(), length * turn.sin()], 1)[:, :width]).T


def check_options(lamb: float, slices: int, global_views: int | None, views: int) -> None:
    """Raise ValueError for a share, a number of directions or of global views that a method cannot use."""
    if not 0 <= lamb <= 1:
        raise ValueError(f"lamb is {lamb:g}, a share: choose a number from 0 to 1")
    if slices < 1:
        raise ValueError(f"slices is {slices}: choose at least 1 direction")
    if global_views is not None and not 1 <= global_views <= views:
        raise ValueError(f"global_views is {global_views}: choose 1 to {views}, the number of views")


def _empty(z: Tensor) -> bool:
    """Return whether no rank has a row."""
    return not (len(z) and z.shape[2] and batch_count(z.shape[1], z))


def sigreg(
    z: Float[Tensor, "v n d"], directions: Float[Tensor, "d k"], samples: Literal["view", "all"] = "view",
    scale: Literal["count", "one"] = "count", points: int = 17, t_max: float = 3.0,
) -> Float[Tensor, ""]:  # fmt: skip
    """Compute SIGReg (Balestriero and LeCun 2025): the Epps-Pulley statistic against N(0, 1) along each direction.

    N integral_-t_max^t_max |mean_n exp(i t a.z_n) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt by the trapezoid rule, averaged
    over directions a and views. Rows are not normalised. For N independent rows of N(0, I) its mean is 1.05 for any N.

    Args:
        z: rows of the whole batch.
        directions: one per column, normalised inside, without gradient.
        samples: "view": each view's N rows are one sample; "all": all V N rows are (N is then V N).
        scale: "one" omits the factor N.
        points: points on [0, t_max]; those below 0 follow from symmetry.
        t_max: end of the integral.

    Raises:
        ValueError: for less than one row, one direction or two points.
    """
    if _empty(z) or not directions.numel() or points < 2:
        raise ValueError(f"SIGReg needs rows, directions and 2 points, got {tuple(z.shape)}, {tuple(directions.shape)} "
                         f"and {points}")  # fmt: skip
    z = wide(z.flatten(0, 1)[None] if samples == "all" else z)
    t = torch.arange(points, device=z.device, dtype=torch.float64) * (t_max / (points - 1))
    target = (-t.square() / 2).exp()
    weight = 2 * t[1] * target
    weight[-1] /= 2  # the first point, 0, has no share: both functions are 1 there
    value: Tensor = _Sliced.apply(z, directions, lambda x: _epps_pulley(x, t, target, weight))
    return value * batch_count(z.shape[1], z) if scale == "count" else value


def wasserstein(z: Float[Tensor, "v n d"], directions: Float[Tensor, "d k"]) -> Float[Tensor, ""]:
    """Return the mean squared difference of sorted projections and the normal quantiles at n / (N + 1).

    It is averaged over samples, directions (columns, normalised inside, without gradient) and views.
    """
    if _empty(z) or not directions.numel():
        raise ValueError(f"it needs rows and directions, got {tuple(z.shape)} and {tuple(directions.shape)}")
    if own_rows():
        every, part = whole(wide(z), 1), own_share(directions, 1)
        with replicated():
            value = wasserstein(every, part) * part.shape[1] if part.numel() else every.sum() * 0
        return loss_sum(value) / directions.shape[1]
    n = z.shape[1]
    place = torch.arange(1, n + 1, dtype=torch.float64, device=z.device) / (n + 1)
    quantile = torch.special.ndtri(place)[:, None]

    def test(x: Tensor) -> tuple[Tensor, Tensor]:
        ordered, order = x.sort(1)
        away = ordered - quantile.to(x)
        return away.square().sum() / n, torch.empty_like(x).scatter_(1, order, away * (2 / n))

    return _Sliced.apply(wide(z), directions, test)  # type: ignore[no-any-return]


def _epps_pulley(x: Tensor, t: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integral, summed over views and directions, and its gradient with respect to projections x."""
    x = x.masked_fill(x.abs() > _PHASE / torch.finfo(x.dtype).eps, torch.nan)
    t, target, weight = (constant.to(x)[1:] for constant in (t, target, weight))
    turn = torch.polar(torch.ones_like(x), x * t[0])
    power, means, n = turn.clone(), [turn.mean(1)], x.shape[1]
    for _ in t[1:]:  # exp(i j dt x): a product for each of the points, instead of a sine and a cosine
        power *= turn
        means.append(power.mean(1))
    mean = torch.stack(means)
    if own_rows():
        count = batch_count(n, x)
        mean, n = batch_sum(mean * n if n else torch.zeros_like(mean)) / count, count  # a rank may have no rows
    away = mean - target[:, None, None]
    value = (weight[:, None, None] * (away.real.square() + away.imag.square())).sum()
    parts = (away.conj() * (weight * t)[:, None, None]).unsqueeze(2)
    wave = power.copy_(parts[-1].expand_as(turn))  # sum_j parts_j exp(i j dt x) by Horner's rule
    for part in parts[:-1].flip(0):
        wave.mul_(turn).add_(part)
    return value, wave.mul_(turn).imag * (-2 / n)


class _Sliced(torch.autograd.Function):
    """Mean of a test over views and directions; its gradient is computed with the value, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, directions: Tensor, test: Test) -> Tensor:
        directions = normalize(directions.detach().T).T.to(z.dtype)
        rows, total = z.flatten(0, 1), z.new_zeros(())
        gradient = torch.zeros_like(rows)
        with using() as plan:  # ranks share the chunks
            # Ranks with their own rows use equal chunks.
            held = len(rows) if plan.peers is None else -(-batch_count(len(rows), rows) // plan.peers.world)
            most = (CHUNK if z.device.type == "cpu" else 64 * CHUNK) // held
            size = max(1, min(most, -(-directions.shape[1] // plan.world)))
            for number, part in enumerate(directions.split(size, 1)):
                if number % plan.world == plan.rank:
                    value, slope = test(product(rows, part).unflatten(0, z.shape[:2]))
                    total += value
                    gradient += product(slope.flatten(0, 1), part.T)
            plan.add(total)
            plan.add(gradient)
        count = len(z) * directions.shape[1]
        ctx.save_for_backward((gradient / count).view_as(z))
        ctx.peers = plan.peers
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.peers is not None:  # the test of every rank is that of all rows
            gradient = gradient.clone()
            ctx.peers.add(gradient)
        return ctx.saved_tensors[0] * gradient, None, None
