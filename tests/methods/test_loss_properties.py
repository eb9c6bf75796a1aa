"""Properties of every equation for any rows: finite or refused, pure, invariant, with the right derivative."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import small_methods as small
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from property_settings import examples
from torch import Tensor

from inbatch import losses
from inbatch.batch import Batch
from inbatch.losses import (
    align_uniform,
    barlow_twins,
    byol,
    cluster_contrast,
    cross_entropy,
    ctr,
    dcl,
    dino,
    hcl,
    info_nce,
    isogclr,
    koleo,
    lejepa,
    mmcr,
    nnclr,
    nt_xent,
    pairwise_sigmoid,
    proto_nce,
    relation,
    sigreg,
    simsiam,
    sinkhorn,
    sogclr,
    supcon,
    swapped_prediction,
    tico,
    vicreg,
    visreg,
    wmse,
)
from inbatch.methods import METHODS
from inbatch.nn import logsumexp, tiles
from inbatch.nn.clustering import concentration
from inbatch.nn.functional import normalize, wide
from inbatch.nn.slicing import random_directions

pytestmark = pytest.mark.filterwarnings("ignore:features depend on each other")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bank(z: Tensor, count: int = 7) -> Tensor:
    """Return unit rows of the width and dtype of z."""
    return normalize(draw(5, count, z.shape[-1])).to(wide(z).dtype)


def assignments(z: Tensor, t: float) -> Tensor:
    contrast, uneven = cluster_contrast(wide(z).softmax(-1), t)
    return contrast + uneven


def whitened(z: Tensor, eps: float = 0.0, norm: bool = True) -> Tensor:
    return wmse(z, torch.arange(z.shape[1])[None], max(1, z.shape[1]), eps, norm)["loss"]


def two(z: Tensor) -> Tensor:
    """Return two views of rows (V, N, D), for equations with exactly two."""
    return z[[0, -1]]


def estimates(z: Tensor, y: Tensor) -> Tensor:
    """Return a logarithm of each sample's estimate, by its label; samples without label were never seen."""
    return torch.where(y < 0, -torch.inf, 0.5 * y).to(wide(z).dtype)


def temperatures(z: Tensor, y: Tensor, t: float) -> Tensor:
    return (t + t * (y % 3) / 3).to(wide(z).dtype)


def stretched(z: Tensor) -> Tensor:
    """Return rows of other directions."""
    return wide(z) * torch.linspace(0.5, 2, z.shape[2])


def past(z: Tensor) -> Tensor:
    """Return a covariance of unit rows of the width of z."""
    rows = bank(z)
    return rows.T @ rows / len(rows)


Equation = Callable[[Tensor, Tensor, float], Tensor]

EQUATIONS: dict[str, Equation] = {
    "nt_xent": lambda z, y, t: nt_xent(z, t),
    "nt_xent, sum": lambda z, y, t: nt_xent(z, t, "sum"),
    "info_nce": lambda z, y, t: info_nce(z[0], z[-1], bank(z), t),
    "ctr": lambda z, y, t: ctr(z[0], z[-1], t),
    "nnclr": lambda z, y, t: nnclr(z[-1], z[0], t),
    "nnclr, nt_xent": lambda z, y, t: nnclr(z[-1], z[0], t, "nt_xent"),
    "byol": lambda z, y, t: byol(z, z.flip(0)),
    "simsiam": lambda z, y, t: simsiam(z, z.flip(0)),
    "fastsiam": lambda z, y, t: simsiam(z, z.flip(0), targets="mean"),
    "simsiam, bare": lambda z, y, t: simsiam(z, z, stop_gradient=False),
    "barlow_twins": lambda z, y, t: barlow_twins(z)["loss"],
    "vicreg": lambda z, y, t: vicreg(z)["loss"],
    "sigreg": lambda z, y, t: sigreg(z, random_directions(z.shape[2], 5)),
    "sigreg, all": lambda z, y, t: sigreg(z, random_directions(z.shape[2], 3), "all", "one", 9, 2.0),
    "lejepa": lambda z, y, t: lejepa(z, random_directions(z.shape[2], 5))["loss"],
    "lejepa, global": lambda z, y, t: lejepa(z, random_directions(z.shape[2], 3), 0.1, 1, weights="sum")["loss"],
    "visreg": lambda z, y, t: visreg(z, random_directions(z.shape[2], 5))["loss"],
    "koleo": lambda z, y, t: koleo(z),
    "koleo, 2": lambda z, y, t: koleo(z, 2),
    "wmse": lambda z, y, t: whitened(z),
    "wmse, plain": lambda z, y, t: whitened(z, norm=False),
    "dcl": lambda z, y, t: dcl(z, t),
    "dclw": lambda z, y, t: dcl(z, t, sigma=0.5),
    "hcl": lambda z, y, t: hcl(z, t),
    "hcl, debiased": lambda z, y, t: hcl(z, t, 0.3, 0.0),
    "swapped_prediction": lambda z, y, t: swapped_prediction(z, sinkhorn(z, t), t),
    "sinkhorn": lambda z, y, t: (wide(z) * sinkhorn(z, t)).mean(),
    "dino": lambda z, y, t: dino(z, z, torch.linspace(0, 0.1, z.shape[2]), t, t),
    "cluster_contrast": lambda z, y, t: assignments(z, t),
    "proto_nce": lambda z, y, t: proto_nce(z[0], torch.cat([z[-1].to(bank(z)), bank(z)]), torch.full((len(y) + 7,), t)),
    "relation": lambda z, y, t: relation(z[0], z[-1], bank(z), t, t),
    "relation, own": lambda z, y, t: relation(z[0], z[-1], bank(z), t, 2 * t, "own"),
    "pairwise_sigmoid": lambda z, y, t: pairwise_sigmoid(z, 1 / t, -5.0),
    "pairwise_sigmoid, groups": lambda z, y, t: pairwise_sigmoid(z, 1 / t, 0.5, y),
    "supcon": lambda z, y, t: supcon(z, y, t),
    "supcon, one": lambda z, y, t: supcon(z, y, t, contrast_mode="one"),
    "supcon, mask": lambda z, y, t: supcon(z, temperature=t, mask=(y[:, None] == y).logical_or(torch.eye(len(y)) > 0)),
    "supcon, alone": lambda z, y, t: supcon(z, None, t),
    "cross_entropy": lambda z, y, t: cross_entropy(z, y.clamp(max=z.shape[2] - 1), 0.1),
    "sogclr": lambda z, y, t: sogclr(two(z), estimates(z, y), t, 0.7)[0],
    "isogclr": lambda z, y, t: isogclr(two(z), estimates(z, y), temperatures(z, y, t), 0.7)[0],
    "align_uniform": lambda z, y, t: align_uniform(two(z), t=min(1 / t, 1e3))["loss"],
    "align_uniform, 1": lambda z, y, t: align_uniform(two(z), alpha=1.0, weight=0.5)["loss"],
    "tico": lambda z, y, t: tico(z[0], z[-1], past(z))[0]["loss"],
    "tico, batch": lambda z, y, t: tico(z[0], z[-1], past(z), detach=False)[0]["loss"],
    "mmcr": lambda z, y, t: mmcr(z)["loss"],
    "mmcr, local": lambda z, y, t: mmcr(z, stretched(z), 0.1, "all")["loss"],
}
"""Every equation for rows (V, N, D), labels (N) and a temperature, if it has one."""

EVERY = pytest.mark.parametrize("name", EQUATIONS)
PAIRS = (
    "nt_xent", "info_nce", "ctr", "nnclr", "dcl", "relation", "hcl", "pairwise_sigmoid", "cluster", "proto_nce",
    "supcon", "sogclr",
)  # fmt: skip
"""Equations with sums over pairs, plain or tiled."""
NORMALISED = (*PAIRS[:8], "byol", "simsiam, bare", "proto_nce", "supcon", "sogclr", "isogclr", "tico", "mmcr")
"""Equations that do not depend on the length of a row."""

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda z: z,
    "zero": torch.zeros_like,
    "one row zero": lambda z: z * (torch.arange(z.shape[1]) > 0)[:, None],
    "constant": torch.ones_like,
    "views alike": lambda z: z[:1].expand_as(z),
    "samples alike": lambda z: z[:, :1].expand_as(z),
    "features alike": lambda z: z[..., :1].expand_as(z),
    "opposite views": lambda z: torch.ones_like(z) * (1 - 2 * (torch.arange(len(z)) % 2))[:, None, None],
    "large": lambda z: z * 1e4,
    "small": lambda z: z * 1e-8,
    "near nothing": lambda z: z * 1e-12,
    "nothing": lambda z: z * 1e-30,
    "large and small": lambda z: z * 10 ** torch.linspace(-8, 8, z.shape[1], dtype=z.dtype)[:, None],
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "width first": lambda z: z.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every other": lambda z: z.repeat_interleave(2, dim=2)[..., ::2],
    "expanded": lambda z: z,
}
LABELS: dict[str, Callable[[int], Tensor]] = {
    "some": lambda n: torch.arange(n) % 3 - 1,
    "equal": lambda n: torch.ones(n, dtype=torch.long),
    "different": torch.arange,
    "unknown": lambda n: torch.full((n,), -1),
}
TEMPERATURES = [1e-6, 1e-3, 0.01, 0.07, 1.0, 10.0, 1e4]
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Given:
    """Rows as passed to the equation, labels, temperature, and the mode of the log-sum-exps."""

    kind: str
    z: Tensor
    y: Tensor
    t: float
    mode: str

    def __call__(self, name: str, z: Tensor | None = None) -> Tensor:
        with logsumexp.using(mode=self.mode):
            return EQUATIONS[name](self.z if z is None else z, self.y, self.t)


@st.composite
def problems(ask: Callable, least: int = 1, kinds: list[str] | None = None) -> Given:
    """Draw rows: views, samples, width, dtype, layout, extremes; least: minimum of views and of samples."""
    v, n = ask(st.sampled_from([x for x in (1, 2, 3, 8) if x >= least])), ask(st.integers(least, 7))
    kind = ask(st.sampled_from(kinds or list(KINDS)))
    rows = KINDS[kind](draw(ask(st.integers(0, 2**31)), v, n, ask(st.sampled_from([1, 2, 3, 12]))))
    kept = ask(st.sampled_from(TYPES))
    rows = rows.clamp(-6e4, 6e4) if kept == torch.float16 else rows
    rows = LAYOUTS[ask(st.sampled_from(list(LAYOUTS)))](rows.to(kept))
    labels = LABELS[ask(st.sampled_from(list(LABELS)))](n)
    mode = ask(st.sampled_from(["auto", "never", "always"]))
    return Given(kind, rows, labels, ask(st.sampled_from(TEMPERATURES)), mode)


def answered(compute: Callable[[], Tensor]) -> Tensor:
    """Return the result; if the equation refuses with a reason, skip the example."""
    try:
        return compute()
    except ValueError as refused:
        assert len(str(refused)) > 20
        assume(False)
        raise


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, also partial ones, in small matrices."""
    monkeypatch.setattr(tiles, "TILE", 5)
    monkeypatch.setattr(tiles, "APART", 2**40)
    monkeypatch.setattr(logsumexp, "_BLOCK", 40)


def test_every_equation_is_here() -> None:
    assert {name.split(",")[0] for name in EQUATIONS} - {"fastsiam", "dclw"} == set(losses.__all__)


@pytest.mark.grid(8)
@EVERY
@examples(15)
@given(problem=problems())
def test_losses_are_finite_or_refuse_their_input(name: str, problem: Given) -> None:
    """The value, and the gradient in at least float32, as in training; half precision only rounds that gradient."""
    original, leaf = problem.z.detach().requires_grad_(), wide(problem.z).detach().requires_grad_()
    loss = answered(lambda: problem(name, leaf))
    assert loss.shape == () and loss.dtype == leaf.dtype and loss.isfinite()
    assert torch.equal(problem(name, original), loss)
    gradient = torch.autograd.grad(loss, leaf)[0]
    assert gradient.isfinite().all()
    largest = float(gradient.abs().max())
    if largest < torch.finfo(original.dtype).max / 16:
        actual = torch.autograd.grad(problem(name, original), original)[0]
        torch.testing.assert_close(actual, gradient.to(original.dtype), rtol=0.02, atol=0.02 * largest)


PLACES = st.tuples(st.sampled_from([0, 1]), st.integers(0, 100), st.integers(0, 100))


@EVERY
@examples(6)
@given(problem=problems(least=2), place=PLACES, value=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_non_finite_rows_give_a_non_finite_loss(
    name: str, problem: Given, place: tuple[int, int, int], value: float
) -> None:
    """For values that the equation uses: a known label, the first view or the last."""
    z, y = problem.z.clone(memory_format=torch.contiguous_format), problem.y.abs()
    logits = name in ("swapped_prediction", "sinkhorn", "dino", "cluster_contrast", "cross_entropy")
    assume(not logits or (z.shape[2] > 1 and value > -math.inf))  # a logit of -inf is a probability of 0
    z[-place[0], place[1] % z.shape[1], place[2] % z.shape[2]] = value
    with logsumexp.using(mode=problem.mode):
        assert not answered(lambda: EQUATIONS[name](z, y, problem.t)).isfinite()


def test_row_whose_square_overflows_gives_nan() -> None:
    """Such a row became a row of zeros, and its loss a number."""
    z = draw(0, 2, 6, 4).float()
    z[0, 0] *= 1e25
    assert not normalize(z)[0, 0].isfinite().any() and normalize(z)[1].isfinite().all()
    assert nt_xent(z).isnan() and byol(z, z).isnan() and barlow_twins(z)["loss"].isnan()


@pytest.mark.grid(13)
@EVERY
@examples(6)
@given(problem=problems(least=2, kinds=["random"]), power=st.sampled_from([17, 20, 30, 37]))
def test_rows_too_large_to_be_squared_give_no_wrong_number(name: str, problem: Given, power: int) -> None:
    """The value that float64 gives, or a value that is not finite."""
    # Relation's targets are a soft-max of the temperature, too: rounding is divided by its square.
    assume(not name.startswith("relation") or problem.t >= 0.01)
    z = (problem.z.float() * 10.0**power).contiguous().requires_grad_()
    loss = answered(lambda: problem(name, z))
    if loss.isfinite():
        expected = problem(name, z.detach().double())
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4 * max(1, 1 / problem.t))
        assert torch.autograd.grad(loss, z)[0].isfinite().all()


HEATED = [
    name
    for name in EQUATIONS
    if name.startswith((*PAIRS, "sinkhorn", "swapped", "dino")) and not name.startswith(("proto_nce", "pairwise"))
]


def test_a_temperature_is_above_0() -> None:
    z, y = draw(0, 2, 5, 4), torch.arange(5) % 3
    for name in HEATED:
        for t in (0.0, -0.1, math.nan, math.inf):
            with pytest.raises(ValueError, match="above 0"):
                print(name, t, float(EQUATIONS[name](z, y, t)))  # shown if nothing is raised


def test_further_temperatures_must_be_above_0() -> None:
    z = draw(0, 2, 5, 4)
    with pytest.raises(ValueError, match="above 0"):
        dcl(z, sigma=0.0)
    with pytest.raises(ValueError, match="above 0"):
        supcon(z, base_temperature=0.0)
    with pytest.raises(ValueError, match="above 0"):
        dino(z, z, torch.zeros(4), teacher_temperature=-0.04)
    for t in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="above 0"):
            concentration(torch.rand(6), torch.arange(6) % 3, 3, t)
        with pytest.raises(ValueError, match="above 0"):
            logsumexp.logsumexp(z[0], z[1], t)


def test_methods_refuse_temperatures_that_are_not_above_0() -> None:
    """Methods built in Python, without a recipe, refuse them when they are built."""
    names = {"temperature", "cluster_temperature", "base_temperature", "teacher_temperature", "warmup_temperature",
             "sigma", "epsilon"}  # fmt: skip
    refused = 0
    for method in METHODS.values():
        for option in names & set(inspect.signature(method).parameters):
            for t in (0.0, -0.1, math.nan, math.inf):
                with pytest.raises(ValueError, match="above 0"):
                    method(**{option: t})
            refused += 1
    assert refused == 21


def moved(name: str, problem: Given, change: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, float]:
    """Return the value of float64 rows before and after a change, and the tolerance of their rounding."""
    z = problem.z.double().contiguous()
    loss = answered(lambda: problem(name, z))
    return problem(name, change(z)), loss, 1e-10 * max(1, 1 / problem.t)


CALM = ["random", "views alike", "large", "small", "one row zero"]


@pytest.mark.grid(13)
@EVERY
@examples(6)
@given(problem=problems(kinds=CALM), seed=st.integers(0, 2**31))
def test_the_order_of_samples_does_not_matter(name: str, problem: Given, seed: int) -> None:
    order = torch.randperm(problem.z.shape[1], generator=torch.Generator().manual_seed(seed))
    if name == "wmse" and problem.z.shape[1] <= problem.z.shape[2]:
        return
    actual, expected, tolerance = moved(name, problem, lambda z: z)
    again = Given(problem.kind, problem.z[:, order], problem.y[order], problem.t, problem.mode)
    actual = moved(name, again, lambda z: z)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=tolerance)


SYMMETRIC = (
    "nt_xent", "nt_xent, sum", "byol", "simsiam", "fastsiam", "simsiam, bare", "barlow_twins", "vicreg", "wmse",
    "wmse, plain", "sigreg", "sigreg, all", "lejepa", "visreg", "koleo", "dcl", "dclw", "swapped_prediction",
    "sinkhorn", "cluster_contrast", "supcon", "supcon, mask", "supcon, alone", "cross_entropy", "dino", "sogclr",
    "isogclr", "align_uniform", "mmcr",
)  # fmt: skip


@pytest.mark.parametrize("name", SYMMETRIC)
@examples(6)
@given(problem=problems(kinds=CALM))
def test_views_may_change_places(name: str, problem: Given) -> None:
    actual, expected, tolerance = moved(name, problem, lambda z: z.flip(0))
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=tolerance)


TURNED = ("nt_xent", "nt_xent, sum", "ctr", "nnclr", "nnclr, nt_xent", "byol", "simsiam", "fastsiam", "dcl", "dclw",
    "supcon", "supcon, one", "supcon, mask", "supcon, alone", "sogclr", "align_uniform", "mmcr")  # fmt: skip
"""Equations that depend only on angles between rows."""


@pytest.mark.parametrize("name", TURNED)
@examples(6)
@given(problem=problems(least=2, kinds=["random", "large"]), seed=st.integers(0, 2**31))
def test_all_rows_may_be_turned(name: str, problem: Given, seed: int) -> None:
    turn = torch.linalg.qr(draw(seed, problem.z.shape[2], problem.z.shape[2]))[0]
    actual, expected, tolerance = moved(name, problem, lambda z: z @ turn)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("name", ["wmse", "wmse, plain"])
@examples(6)
@given(seed=st.integers(0, 2**31), d=st.integers(1, 4))
def test_whitening_removes_scales_shifts_and_triangular_mixtures(name: str, seed: int, d: int) -> None:
    z, y = draw(seed, 2, 12, d), torch.zeros(12, dtype=torch.long)
    change = torch.eye(d, dtype=torch.float64) + draw(seed + 1, d, d).triu(1)
    torch.testing.assert_close(EQUATIONS[name](3 + 7 * z @ change, y, 1.0), EQUATIONS[name](z, y, 1.0))


@examples(6)
@given(problem=problems(least=2, kinds=["random"]), seed=st.integers(0, 2**31))
def test_barlow_twins_is_invariant_to_scale_and_shift_of_features(problem: Given, seed: int) -> None:
    scale, shift = 1e3 * draw(seed, 1, problem.z.shape[2]).exp(), draw(seed + 1, 1, problem.z.shape[2])
    z = 1e3 * problem.z.double()
    torch.testing.assert_close(barlow_twins(z * scale + shift)["loss"], barlow_twins(z)["loss"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in EQUATIONS if name.startswith(NORMALISED) and name != "fastsiam"])
@examples(6)
@given(problem=problems(least=2, kinds=["random"]), seed=st.integers(0, 2**31))
def test_the_length_of_a_row_does_not_matter_where_rows_are_normalised(name: str, problem: Given, seed: int) -> None:
    """The gradient does not change the length either: it is orthogonal to every row."""
    scale = draw(seed, *problem.z.shape[:2], 1).exp()
    actual, expected, tolerance = moved(name, problem, lambda z: z * scale)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=tolerance)
    z = problem.z.double().contiguous().requires_grad_()
    gradient = torch.autograd.grad(problem(name, z), z)[0]
    along = (gradient * normalize(z.detach())).sum(-1)
    assert along.abs().max() <= 1e-9 * max(1, 1 / problem.t) * max(1, float(1 / z.norm(dim=-1).min()))


@pytest.mark.grid(13)
@pytest.mark.parametrize("name", [name for name in EQUATIONS if "sogclr" not in name and name != "visreg"])
@examples(4)
@given(problem=problems(kinds=["random", "views alike"]), t=st.sampled_from([0.1, 1.0, 10.0]))
def test_the_gradient_is_the_derivative(name: str, problem: Given, t: float) -> None:
    """Finite differences in float64; inputs without gradient (keys, codes, targets) are constant copies.

    SogCLR's averages have tests of their own, and VISReg divides by a standard deviation without gradient: its gradient
    is that of the vectors.
    """
    z = problem.z.double()[:2, :3, :3].contiguous()
    assume(name not in ("barlow_twins", "vicreg", "cross_entropy") or problem.kind == "random")
    y, x = problem.y[:3], z.clone().requires_grad_()
    answered(lambda: EQUATIONS[name](z, y, t))
    still = {
        "info_nce": lambda x: info_nce(x[0], z[-1], bank(z), t),
        "ctr": lambda x: ctr(x[0], z[-1], t),
        "nnclr": lambda x: nnclr(z[-1], x[0], t),
        "nnclr, nt_xent": lambda x: nnclr(z[-1], x[0], t, "nt_xent"),
        "byol": lambda x: byol(x, z.flip(0)),
        "simsiam": lambda x: simsiam(x, z.flip(0)),
        "fastsiam": lambda x: simsiam(x, z.flip(0), targets="mean"),
        "swapped_prediction": lambda x: swapped_prediction(x, sinkhorn(z, t), t),
        "sinkhorn": lambda x: (x * sinkhorn(z, t)).mean(),
        "dino": lambda x: dino(x, z, torch.linspace(0, 0.1, z.shape[2]), t, t),
        "relation": lambda x: relation(x[0], z[-1], bank(z), t, t),
        "relation, own": lambda x: relation(x[0], z[-1], bank(z), t, 2 * t, "own"),
        "tico": lambda x: tico(x[0], z[-1], tico(z[0], z[-1], past(z))[1], beta=1.0)[0]["loss"],
        "tico, batch": lambda x: tico(x[0], z[-1], past(z), detach=False)[0]["loss"],
        "mmcr, local": lambda x: mmcr(x, stretched(z), 0.1, "all")["loss"],
    }.get(name, lambda x: EQUATIONS[name](x, y, t))
    with logsumexp.using(mode=problem.mode):
        assert torch.autograd.gradcheck(still, x, atol=1e-6, rtol=1e-3)


@pytest.mark.grid(13)
@EVERY
@examples(6)
@given(problem=problems(least=2, kinds=["random", "small"]), t=st.sampled_from([0.01, 0.07, 1.0]))
def test_float32_is_float64_but_for_roundings(name: str, problem: Given, t: float) -> None:
    """Within 1e-5, plus 2e-6 / T for products of rows: the documented bound. bfloat16 rows count as exact."""
    z = problem.z.float()
    problem = Given(problem.kind, z, problem.y, t, problem.mode)
    actual, expected = answered(lambda: problem(name)), problem(name, z.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5 + 2e-6 / t)


@pytest.mark.grid(13)
@EVERY
@examples(6)
@given(problem=problems())
def test_losses_are_pure(name: str, problem: Given) -> None:
    """Two calls give the same value and gradient, bit for bit; rows and labels are unchanged."""
    z, y = problem.z.clone(), problem.y.clone()
    leaf, results = problem.z.detach().requires_grad_(), []
    for _ in range(2):
        loss = answered(lambda: problem(name, leaf))
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(problem.z, z) and torch.equal(problem.y, y)


@pytest.mark.grid(13)
@pytest.mark.parametrize("variant", small.VARIANTS)
@examples(6)
@given(
    kind=st.sampled_from(list(KINDS)), t=st.sampled_from(TEMPERATURES), kept=st.sampled_from(TYPES),
    labels=st.sampled_from(list(LABELS)), broken=st.sampled_from([None, None, math.nan, math.inf]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_every_method(
    variant: str, kind: str, t: float, kept: torch.dtype, labels: str, broken: float | None, seed: int
) -> None:
    """Finite loss and gradient through the registry; rows with nan or infinity never give a number."""
    name = small.VARIANTS[variant][0]
    options = inspect.signature(METHODS[name]).parameters
    heated = {option: t for option in ("temperature", "tau_min", "tau_max") if option in options}
    method, views, n = small.create(variant, **heated), small.views_of(variant), 8
    heads = method.heads(12)
    width = {"classifier": 3, "clusters": 3, "prototypes": 6, "projection": 8, "prediction": 8,
             "features": 12, "scaled": 10}  # fmt: skip
    width["projection"] = {"wmse": 2, "relation": 12}.get(name, 8)  # that of relation's teacher
    assert set(method.online) <= set(width) and heads

    def rows(names: tuple[str, ...], chosen: Sequence[int], seed: int) -> dict[str, Tensor]:
        tensors = {x: KINDS[kind](draw(seed + i, len(chosen), n, width[x])) for i, x in enumerate(names)}
        limit = 6e4 if kept == torch.float16 else math.inf
        return {x: wide(rows.clamp(-limit, limit).to(kept)) for x, rows in tensors.items()}  # float32, as in training

    online = rows(method.online, method.online_views(views), seed)
    target = rows(method.target, method.target_views(views), seed + 10)
    if broken is not None:
        online[method.online[-1]][0, 1, 0] = broken
    y = LABELS[labels](n).clamp(max=2)
    if broken is not None and name == "supervised":
        y = y.abs()
    leaves = {x: rows.requires_grad_() for x, rows in online.items()}
    loss = method.loss(leaves, target, Batch(torch.arange(n), y))["loss"]
    if broken is not None:
        assert not loss.isfinite()
        return
    assert loss.isfinite()
    loss.backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in leaves.values())
