"""Equations against versions written as loops, and at the limits of their inputs."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inbatch import losses
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
from inbatch.nn.functional import wide
from inbatch.nn.slicing import random_directions

LABEL = torch.tensor([0, 1, 0, -1, 2, 1])


def queue(width: int) -> Tensor:
    rows = torch.randn(7, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


EQUATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "nt_xent": lambda z, t: nt_xent(z, t),
    "info_nce": lambda z, t: info_nce(z[0], z[1], queue(z.shape[2]), t),
    "ctr": lambda z, t: ctr(z[0], z[1], t),
    "nnclr": lambda z, t: nnclr(z[0], z[1], t),
    "byol": lambda z, t: byol(z, z),
    "simsiam": lambda z, t: simsiam(z, z),
    "barlow_twins": lambda z, t: barlow_twins(z)["loss"],
    "vicreg": lambda z, t: vicreg(z)["loss"],
    "sigreg": lambda z, t: sigreg(z, random_directions(z.shape[2], 5)),
    "lejepa": lambda z, t: lejepa(z, random_directions(z.shape[2], 5))["loss"],
    "visreg": lambda z, t: visreg(z, random_directions(z.shape[2], 5))["loss"],
    "koleo": lambda z, t: koleo(z),
    "wmse": lambda z, t: wmse(z[..., :2], torch.arange(6)[None], 3)["loss"],
    "dcl": lambda z, t: dcl(z, t, sigma=0.5),
    "hcl": lambda z, t: hcl(z, t),
    "sogclr": lambda z, t: sogclr(z, torch.zeros(6), t)[0],
    "isogclr": lambda z, t: isogclr(z, torch.zeros(6), torch.full((6,), t))[0],
    "align_uniform": lambda z, t: align_uniform(z)["loss"],
    "tico": lambda z, t: tico(z[0], z[1], torch.eye(z.shape[2]))[0]["loss"],
    "mmcr": lambda z, t: mmcr(z)["loss"],
    "swapped_prediction": lambda z, t: swapped_prediction(z, sinkhorn(z, t), t),
    "sinkhorn": lambda z, t: (z * sinkhorn(z, t)).mean(),
    "dino": lambda z, t: dino(z, z, torch.linspace(0, 0.1, z.shape[2]), t, t),
    "cluster_contrast": lambda z, t: sum(cluster_contrast(wide(z).softmax(-1), t)),
    "proto_nce": lambda z, t: proto_nce(z[0], torch.cat([z[1], queue(z.shape[2])]), torch.full((13,), t)),
    "relation": lambda z, t: relation(z[0], z[1], queue(z.shape[2]), t, t),
    "pairwise_sigmoid": lambda z, t: pairwise_sigmoid(z, 1 / t),
    "supcon": lambda z, t: supcon(z, LABEL, t),
    "cross_entropy": lambda z, t: cross_entropy(z, LABEL),
}
"""Every equation for rows (2, 6, D) at a temperature, if it has one."""


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum().sqrt()


def literal_nt_xent(z: Tensor, t: float) -> Tensor:
    """Chen et al. 2020, Eq. 1, one anchor and one positive at a time."""
    rows = {(v, i): unit(z[v, i]) for v in range(z.shape[0]) for i in range(z.shape[1])}
    terms = []
    for (v, i), u in rows.items():
        everyone = sum((u @ w / t).exp() for key, w in rows.items() if key != (v, i))
        others = [rows[w, i] for w in range(z.shape[0]) if w != v]
        terms.append(sum(-((u @ p / t).exp() / everyone).log() for p in others) / len(others))
    return sum(terms) / len(terms)


def literal_supcon(z: Tensor, positive: Callable[[int, int], bool], t: float, base: float, anchors: str) -> Tensor:
    """Khosla et al. 2020, Eq. 2; positive(i, j): whether sample j is a positive of sample i."""
    rows = {(v, i): unit(z[v, i]) for v in range(z.shape[0]) for i in range(z.shape[1])}
    terms = []
    for (v, i), u in rows.items():
        if anchors == "one" and v > 0:
            continue
        everyone = sum((u @ w / t).exp() for key, w in rows.items() if key != (v, i))
        positives = [w for (x, j), w in rows.items() if positive(i, j) and (x, j) != (v, i)]
        mean = (
            sum(((u @ p / t).exp() / everyone).log() for p in positives) / len(positives) if positives else 0 * u.sum()
        )
        terms.append(-t / base * mean)
    return sum(terms) / len(terms)


def literal_info_nce(q: Tensor, k: Tensor, queue: Tensor, t: float, smooth: float = 0, neighbours: int = 1) -> Tensor:
    """He et al. 2020, Eq. 1; a cross-entropy whose target is shared with the nearest keys."""
    terms = []
    for i in range(len(q)):
        logits = torch.stack([unit(q[i]) @ key / t for key in [unit(k[i]).detach(), *queue]])
        nearest = sorted(range(1, len(logits)), key=lambda j: float(logits[j].detach()), reverse=True)[:neighbours]
        target = torch.zeros_like(logits)
        target[0] = 1 - smooth
        target[nearest] = smooth / neighbours
        terms.append(-(target * (logits.exp() / logits.exp().sum()).log()).sum())
    return sum(terms) / len(terms)


def literal_cross_entropy(logits: Tensor, label: Tensor, smoothing: float) -> Tensor:
    terms = []
    for view in logits:
        for i in range(len(label)):
            if label[i] >= 0:
                log = (view[i].exp() / view[i].exp().sum()).log()
                wanted = [smoothing / len(log) + (1 - smoothing) * int(c == label[i]) for c in range(len(log))]
                terms.append(-sum(w * x for w, x in zip(wanted, log, strict=True)))
    return sum(terms) / len(terms) if terms else 0 * logits.sum()


def assert_same(equation: Callable[..., Tensor], literal: Callable[..., Tensor], *rows: Tensor) -> None:
    """Check that values are equal, and gradients for every tensor of rows."""
    actual, expected = ([r.clone().requires_grad_() for r in rows] for _ in range(2))
    loss, slow = equation(*actual), literal(*expected)
    torch.testing.assert_close(loss, slow, rtol=1e-9, atol=1e-10)
    loss.backward()
    slow.backward()
    for a, b in zip(actual, expected, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10)


seeds, temperatures = st.integers(0, 2**32), st.floats(0.05, 2)
samples, widths = st.integers(2, 4), st.integers(1, 4)
few = settings(max_examples=20, deadline=None)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@few
@given(seed=seeds, v=st.integers(2, 3), n=samples, d=widths, t=temperatures)
def test_nt_xent(seed: int, v: int, n: int, d: int, t: float) -> None:
    z = draw(seed, v, n, d)
    assert_same(lambda z: nt_xent(z, t), lambda z: literal_nt_xent(z, t), z)
    assert_same(lambda z: nt_xent(z, t, "sum"), lambda z: v * literal_nt_xent(z, t), z)


@few
@given(seed=seeds, n=st.integers(1, 4), m=st.integers(1, 6), d=widths, t=temperatures)
def test_info_nce(seed: int, n: int, m: int, d: int, t: float) -> None:
    bank = torch.nn.functional.normalize(draw(seed + 1, m, d), dim=1)
    q, k = draw(seed, 2, n, d)
    assert_same(lambda q, k: info_nce(q, k, bank, t), lambda q, k: literal_info_nce(q, k, bank, t), q, k)
    near = seed % m + 1
    assert_same(
        lambda q, k: info_nce(q, k, bank, t, 0.3, near), lambda q, k: literal_info_nce(q, k, bank, t, 0.3, near), q, k
    )


@few
@given(
    seed=seeds, v=st.integers(1, 3), n=samples, d=widths, t=temperatures, base=temperatures,
    anchors=st.sampled_from(["all", "one"]), kind=st.sampled_from(["labels", "mask", "neither"]),
)  # fmt: skip
def test_supcon(seed: int, v: int, n: int, d: int, t: float, base: float, anchors: str, kind: str) -> None:
    g = torch.Generator().manual_seed(seed)
    label, mask = torch.randint(-1, 2, (n,), generator=g), torch.rand(n, n, generator=g) < 0.5
    if kind == "labels":
        arguments, positive = {"label": label}, lambda i, j: i == j or bool(label[i] == label[j] >= 0)
    elif kind == "mask":
        arguments, positive = {"mask": mask}, lambda i, j: bool(mask[i, j])
    else:
        arguments, positive = {}, lambda i, j: i == j
        v = max(v, 2)
    assert_same(
        lambda z: supcon(z, temperature=t, base_temperature=base, contrast_mode=anchors, **arguments),
        lambda z: literal_supcon(z, positive, t, base, anchors),
        draw(seed, v, n, d),
    )


@few
@given(seed=seeds, v=st.integers(1, 3), n=st.integers(1, 4), classes=st.integers(2, 4), smoothing=st.floats(0, 0.5))
def test_cross_entropy(seed: int, v: int, n: int, classes: int, smoothing: float) -> None:
    label = torch.randint(-1, classes, (n,), generator=torch.Generator().manual_seed(seed))
    assert_same(
        lambda x: cross_entropy(x, label, smoothing),
        lambda x: literal_cross_entropy(x, label, smoothing),
        3 * draw(seed, v, n, classes),
    )


def test_supcon_without_labels_is_nt_xent() -> None:
    z, alone = draw(0, 3, 5, 4), torch.full((5,), -1)
    for labels in (None, alone):
        torch.testing.assert_close(supcon(z, labels, 0.3, base_temperature=0.3), nt_xent(z, 0.3))


def test_every_equation_is_tested_below() -> None:
    assert EQUATIONS.keys() == set(losses.__all__)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EQUATIONS)
def test_half_precision_in_single_inside(name: str, dtype: torch.dtype) -> None:
    """Half-precision rows give the result of the same numbers in float32, to the last bit; so does autocast."""
    z = draw(0, 2, 6, 8).to(dtype)
    expected = EQUATIONS[name](z.float(), 0.1)
    assert expected.dtype == torch.float32
    assert torch.equal(EQUATIONS[name](z, 0.1), expected)
    with torch.autocast("cpu", dtype):
        assert torch.equal(EQUATIONS[name](z.float(), 0.1), expected)


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda z: z,
    "all zero": torch.zeros_like,
    "one zero": lambda z: z * (torch.arange(z.shape[1]) > 0)[:, None],
    "constant": torch.ones_like,
    "opposite": lambda z: torch.ones_like(z) * torch.tensor([1, -1])[:, None, None],
    "large": lambda z: z * 1e4,
}


@pytest.mark.grid(30)
@pytest.mark.filterwarnings("ignore:features depend on each other")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", EQUATIONS)
def test_extreme_rows_have_finite_loss_and_gradient(name: str, rows: str, dtype: torch.dtype) -> None:
    z = ROWS[rows](draw(0, 2, 6, 8)).to(dtype)
    if (name, rows, dtype) == ("vicreg", "large", torch.float16):
        z = z.float()  # as in training: the gradient grows with the cube of the rows, beyond the range of float16
    if (name, rows, dtype) == ("koleo", "all zero", torch.float16):
        z = z.float()  # as in training: the gradient is 1 / eps
    z.requires_grad_()
    loss = EQUATIONS[name](z, 0.01)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: nt_xent(draw(0, 1, 6, 4)),  # no positive
        lambda: nt_xent(draw(0, 2, 1, 4)),  # no negative
        lambda: supcon(draw(0, 1, 1, 4), LABEL[:1]),
        lambda: supcon(draw(0, 1, 6, 4)),
        lambda: supcon(draw(0, 2, 6, 4), LABEL, mask=torch.eye(6)),
        lambda: info_nce(draw(0, 0, 4), draw(0, 0, 4), queue(4)),
        lambda: info_nce(draw(0, 3, 4), draw(0, 3, 4), queue(4), smooth=1.0),
        lambda: info_nce(draw(0, 3, 4), draw(0, 3, 4), queue(4)[:5], smooth=0.1),
    ],
    ids=[
        "one view",
        "one sample",
        "one row",
        "one view without labels",
        "labels and mask",
        "no query",
        "no target",
        "few keys",
    ],
)
def test_invalid_input_is_refused(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"NT-Xent|SupCon|InfoNCE"):
        call()
