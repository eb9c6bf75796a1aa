"""Mixing: the vectors of the authors' code, and every method's loss of mixed rows as loops."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_vectors import DTYPES, Case, unlabelled
from small_methods import create
from torch import Tensor

from inbatch.batch import MIXED, Batch, Mixture, Rows
from inbatch.context.mixing import Draw, IMix, MixCo, Mixer, UnMix
from inbatch.losses import align_uniform, vicreg
from inbatch.methods import METHODS
from inbatch.methods.base import Method
from inbatch.nn.functional import normalize
from inbatch.nn.negatives import Negatives
from inbatch.training.mixing import StepMixing


class Recorded:
    """A step whose draws are those that the authors' code made: {view: draw}."""

    def __init__(self, mixer: Mixer, method: Method, samples: int, draws: dict[int, Draw], views: int = 2) -> None:
        self.mixing = StepMixing(mixer, method, views, 0, 1, samples, False, _draws=draws)

    def images(self, view: int, rows: Tensor) -> Tensor:
        """Return rows (N, D) mixed as images of one pixel."""
        return self.mixing.images(view, 0, rows[..., None, None])[..., 0, 0]

    def loss(
        self, plain: Tensor | None, mixed: Tensor, target: Tensor | None = None, head: str = "projection"
    ) -> Tensor:
        rows: Rows = ({} if plain is None else {head: plain}) | {MIXED + head: mixed}
        batch = unlabelled(self.mixing.samples)
        return self.mixing.loss(rows, {} if target is None else {"projection": target}, batch)["loss"]


def permuted(case: Case) -> Draw:
    return Draw(case["perm"][None], torch.maximum(case["lam_raw"], 1 - case["lam_raw"])[None].double())


def moco(case: Case, dtype: torch.dtype, **options: object) -> Method:
    """Return MoCo with the queue of a vector."""
    width, size = case["queue0"].shape
    method = METHODS["moco"](case.options["temperature"], size, out_dim=width, **options)
    method.queue.to(dtype).rows.copy_(case["queue0"].T)
    return method


@DTYPES
@pytest.mark.parametrize("name", ["npair", "moco", "byol"])
def test_vectors_of_imix(golden: Path, name: str, dtype: torch.dtype) -> None:
    """The authors' BYOL has one of the two directions; keys carry gradient only without a target network."""
    case = Case(golden, f"imix__{name}", dtype)
    method: Method = METHODS["byol"]() if name == "byol" else METHODS["simclr"](case.options.get("temperature", 1.0))
    if name == "moco":
        method = moco(case, dtype)
    step = Recorded(IMix(), method, case.options["batch"], {0: permuted(case), 1: permuted(case)})
    case.check(step.images(0, case["x_q"]), "mixed")
    mixed, keys = case.leaf("mixed"), case.leaf("x_k")
    plain, target, head = keys[None], None, "projection"
    if name != "npair":
        plain, target, head = None, keys[None], "projection" if name == "moco" else "prediction"
    if name == "byol":  # the same in both directions
        loss = step.loss(None, torch.stack([mixed, mixed]), torch.stack([keys, keys]), head) / 2
    else:
        loss = step.loss(plain, mixed[None], target, head)
    case.check(loss, "loss")
    loss.backward()
    case.check(mixed.grad, "grad_mixed")
    if name == "npair":
        case.check(keys.grad, "grad_x_k")
    else:
        assert keys.grad is None
    if name == "moco":
        method.after_step({}, {"projection": keys.detach()[None]}, unlabelled(len(keys)), 0.0)
        case.check(method.queue.rows.T, "queue_after")


@DTYPES
def test_vectors_of_mixco_with_moco(golden: Path, dtype: torch.dtype) -> None:
    case = Case(golden, "mixco__moco", dtype)
    half = case.options["batch"] // 2
    draw = Draw(torch.arange(half, 2 * half)[None], case["lam"][None].double())
    mixer = MixCo(case.options["mix_param"], case.options["mix_temperature"])
    step = Recorded(mixer, moco(case, dtype), 2 * half, {0: draw})
    case.check(step.images(0, case["x_q"]), "mixed")
    q, k, mixed = case.leaf("x_q"), case.leaf("x_k"), case.leaf("mixed")
    loss = step.loss(q[None], mixed[None], k[None])
    case.check(loss, "loss")
    loss.backward()
    case.check(q.grad, "grad_x_q")
    case.check(mixed.grad, "grad_mixed")
    assert k.grad is None


@DTYPES
def test_vectors_of_mixco_with_simclr(golden: Path, dtype: torch.dtype) -> None:
    """Gradients are those of unit rows: the vectors' plain rows are normalised before."""
    case = Case(golden, "mixco__simclr", dtype)
    half = case.options["batch"] // 2
    draws = {v: Draw(torch.arange(half, 2 * half)[None], case[f"lam{v + 1}"][None].double()) for v in (0, 1)}
    method = METHODS["simclr"](case.options["temperature"])
    step = Recorded(MixCo(temperature=case.options["mix_temperature"]), method, 2 * half, draws)
    mixed = [case.leaf("mixed1"), case.leaf("mixed2")]
    for v in (0, 1):
        case.check(step.images(v, case[f"x{v + 1}"]), f"mixed{v + 1}")
    z = normalize(torch.stack([case["x1"], case["x2"]])).requires_grad_()
    loss = step.loss(z, torch.stack(mixed))
    case.check(loss, "loss")
    loss.backward()
    for v in (0, 1):
        case.check(mixed[v].grad, f"grad_mixed{v + 1}")
        # Normalising unit rows again removes the part of the gradient along the row.
        along = (case[f"grad_z{v + 1}"] * z[v].detach()).sum(-1, keepdim=True) * z[v].detach()
        torch.testing.assert_close(z.grad[v], case[f"grad_z{v + 1}"] - along, **case.tolerance)


@DTYPES
@pytest.mark.parametrize("name", ["one_way", "symmetric"])
def test_vectors_of_unmix(golden: Path, name: str, dtype: torch.dtype) -> None:
    case = Case(golden, f"unmix__{name}", dtype)
    n, symmetric = case.options["batch"], name == "symmetric"
    draw = Draw(torch.arange(n - 1, -1, -1)[None], case["lam"].double().expand(1, n))
    method = moco(case, dtype, symmetric=symmetric)
    step = Recorded(UnMix(), method, n, {0: draw})
    case.check(step.images(0, case["x1"]), "mixed")
    x1, x2, mixed = case.leaf("x1"), case.leaf("x2"), case.leaf("mixed")
    plain, keys = (
        (torch.stack([x1, x2]), torch.stack([x2, x1]).detach()) if symmetric else (x1[None], x2[None].detach())
    )
    loss = step.loss(plain, mixed[None], keys)
    case.check(loss, "loss")
    loss.backward()
    case.check(x1.grad, "grad_x1")
    case.check(mixed.grad, "grad_mixed")
    if symmetric:
        case.check(x2.grad, "grad_x2")
    # The authors' symmetric code pushes the keys of view 1 first, inbatch those of view 2.
    method.after_step({}, {"projection": keys.flip(0)}, unlabelled(n), 0.0)
    case.check(method.queue.rows.T, "queue_after")


# One sample of a mixed pair: the loss of query i with the key p as positive.


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def cross_entropy(logits: list[Tensor], p: int) -> Tensor:
    return -torch.stack(logits).log_softmax(0)[p]


def contrast(q: Tensor, k: Tensor, p: int, t: float, more: Tensor | None = None) -> Tensor:
    rows = [*unit(k), *([] if more is None else more)]
    return cross_entropy([unit(q) @ row / t for row in rows], p)


def of_moco(m: Method, q: Rows, k: Tensor, p: int, i: int, batch: Batch) -> Tensor:
    loss = contrast(q["projection"][i], k, p, m.temperature, m.queue.rows)
    row = unit(q["projection"][i])
    near = sorted(m.queue.rows, key=lambda x: -float((row @ x).detach()))[: m.neighbours]
    loss = loss + m.smooth * row @ (unit(k)[p] - sum(near) / len(near)) / m.temperature
    return loss * (2 if m.symmetric else 1)


def of_dcl(m: Method, q: Rows, k: Tensor, p: int, i: int, batch: Batch) -> Tensor:
    row = unit(q["projection"][i])
    negative = torch.stack([row @ x / m.temperature for j, x in enumerate(unit(k)) if j != p]).logsumexp(0)
    return negative - row @ unit(k)[p] / m.temperature


def of_supcon(m: Method, q: Rows, k: Tensor, p: int, i: int, batch: Batch) -> Tensor:
    label = batch.label.tolist()
    same = [j for j in range(len(k)) if j == p or (label[j] == label[p] and label[p] >= 0)]
    terms = [contrast(q["projection"][i], k, j, m.temperature) for j in same]
    return sum(terms) / len(terms) * m.temperature / m.base_temperature


def of_dino(m: Method, q: Rows, k: Tensor, p: int, i: int, batch: Batch) -> Tensor:
    target = ((k[p] - m.center) / m.teacher_temperatures[0]).softmax(0)
    return -(target * (q["prototypes"][i] / m.temperature).log_softmax(0)).sum()


def of_sigmoid(m: Method, q: Rows, k: Tensor, p: int, i: int, batch: Batch) -> Tensor:
    row, t, b = q["scaled"][i, :-2], q["scaled"][i, -2], q["scaled"][i, -1]
    logits = torch.stack([t * unit(row) @ unit(key[:-2]) + b for key in k])
    return torch.nn.functional.softplus(logits).sum() - logits[p]


def of_swav(m: Method, q: Rows, k: Tensor, p: int, i: int, batch: Batch) -> Tensor:
    code = (k / m.epsilon).exp()
    for _ in range(m.iterations):
        code = code / code.sum(0)
        code = code / code.sum(1, keepdim=True)
    return -(code[p] * (q["prototypes"][i] / m.temperature).log_softmax(0)).sum()


def of_pcl(m: Method, q: Rows, k: Tensor, p: int, i: int, batch: Batch) -> Tensor:
    row, terms = unit(q["projection"][i]), []
    for key, clustering in enumerate(m.clusterings.every):
        columns, density, counts = clustering.columns(batch, m.clusterings.negatives, key)
        each = zip(columns, density, counts, strict=True)
        terms.append(cross_entropy([row @ unit(c) / d for c, d, yes in each if yes], p))
    return contrast(q["projection"][i], k, p, m.temperature, m.queue.rows) + sum(terms) / len(terms)


def of_negatives(
    m: Method, q: Rows, k: Tensor, p: int, i: int, batch: Batch, kind: Negatives, queue: Tensor | None = None
) -> Tensor:
    """Return log(positive + sum over negatives) - positive; without the positive in the sum for DCL."""
    row, t = unit(next(iter(q.values()))[i]), m.temperature
    same = list(range(len(k))) if kind.same is None else kind.same.tolist()
    keys = [unit(k)[j] for j in range(len(k)) if same[j] != same[p]] + ([] if queue is None else [*queue])
    positive, e = row @ unit(k)[p], torch.stack([(row @ key / t).exp() for key in keys])
    total = e.sum()
    if kind.tau_plus is not None:
        weight = e**kind.beta
        total = (e * weight).sum() / weight.mean() - kind.tau_plus * len(e) * (positive / t).exp()
        total = (total / (1 - kind.tau_plus)).clamp(min=len(e) * math.exp(-1 / t))
    return (total if m.__class__.__name__ == "DCL" else total + (positive / t).exp()).log() - positive / t


def of_relation(m: Method, q: Rows, k: Tensor, p: int, i: int, batch: Batch) -> Tensor:
    filled = m.queue.rows[: int(m.queue.filled)]
    center = torch.cat([unit(k), filled]).mean(0) if m.center else torch.zeros(k.shape[1]).to(k)
    t, queue = unit(unit(k) - center), unit(m.queue.rows - center)
    rows = [*(t if m.candidates == "batch" else [t[p]]), *queue]
    target = torch.stack([t[p] @ row / m.teacher_temperature for row in rows]).softmax(0)
    predicted = torch.stack([unit(q["projection"])[i] @ row / m.temperature for row in rows]).log_softmax(0)
    return -(target * predicted).sum()


LITERAL: dict[str, Callable[..., Tensor]] = {
    "simclr": lambda m, q, k, p, i, batch: contrast(q["projection"][i], k, p, m.temperature),
    "mocov3": lambda m, q, k, p, i, batch: 4 * m.temperature * contrast(q["prediction"][i], k, p, m.temperature),
    "byol": lambda m, q, k, p, i, batch: 2 * (unit(q["prediction"][i]) - unit(k)[p]).square().sum(),
    "simsiam": lambda m, q, k, p, i, batch: -unit(q["prediction"][i]) @ unit(k)[p],
    "moco": of_moco,
    "moco-smooth": of_moco,
    "moco-symmetric": of_moco,
    "dcl": of_dcl,
    "dino": of_dino,
    "supcon": of_supcon,
    "sigmoid": of_sigmoid,
    "swav-plain": of_swav,
    "pcl": of_pcl,
    "hcl": lambda m, *arguments: of_negatives(m, *arguments, Negatives(tau_plus=m.tau_plus, beta=m.beta)),
    "relation": of_relation,
    "relation-own": of_relation,
}
"""Variant -> loss of query i of the mixed rows with the key p."""


def some_rows(method: Method, seed: int = 0) -> tuple[Rows, Rows, Batch]:
    """Return rows of 4 mixed images, keys of 6 samples in one view, and the batch."""
    g = torch.Generator().manual_seed(seed)

    def draw(n: int, name: str) -> Tensor:
        widths = {"prototypes": 6, "classifier": 3, "features": 12, "scaled": 10}
        width = widths.get(name, getattr(method, "out_dim", 12))
        return torch.randn(n, width, generator=g, dtype=torch.float64)

    query = {name: draw(4, name).requires_grad_() for name in method.online}
    keys = {name: draw(6, name)[None] for name in (method.target or method.online)}
    if getattr(method, "queue", None) is not None:
        method.queue.rows.copy_(unit(torch.randn(method.queue.rows.shape, generator=g, dtype=torch.float64)))
    return query, keys, Batch(torch.arange(6), torch.tensor([0, 1, 0, -1, 2, -1]))


def pairs(**options: object) -> Mixture:
    share = torch.tensor([0.9, 0.2, 0.5, 0.75], dtype=torch.float64)
    return Mixture(torch.tensor([[0, 1, 2, 3], [3, 2, 4, 5]]), torch.stack([share, 1 - share]), **options)


@pytest.mark.parametrize("variant", LITERAL)
def test_the_loss_of_mixed_rows_as_loops(variant: str) -> None:
    """Value and gradient: the mean over the images of share times the loss of each of the two samples."""
    method = create(variant).double()
    query, keys, batch = some_rows(method)
    mixture = pairs()
    actual = method.mixed_loss(query, keys, mixture, batch)
    key = next(reversed(keys.values()))[0]
    expected = by_loops(mixture, lambda p, i: LITERAL[variant](method, query, key, p, i, batch))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    head = "prototypes" if "prototypes" in method.online else method.online[0]
    slopes = [torch.autograd.grad(loss, query[head])[0] for loss in (actual, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)


def by_loops(mixture: Mixture, loss: Callable[[int, int], Tensor]) -> Tensor:
    """Return the mean over 4 images of share times the loss of each of the two samples."""
    pairs_of = [(s, i) for i in range(4) for s in range(2)]
    return sum(mixture.weight[s, i] * loss(int(mixture.positive[s, i]), i) for s, i in pairs_of) / 4


KINDS = {
    "drop": Negatives(torch.tensor([0, 1, 0, 3, 1, 5])),
    "debias": Negatives(tau_plus=0.1),
    "hard": Negatives(tau_plus=0.1, beta=1.0),
    "both": Negatives(torch.tensor([0, 1, 0, 3, 1, 5]), 0.1, 1.0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["simclr", "dcl", "mocov3", "moco", "moco, own key"])
def test_negatives_of_mixed_rows_as_loops(variant: str, kind: str) -> None:
    """A near duplicate of one of the two samples is not a negative of it, but of the other sample."""
    method, own = create(variant.split(",")[0]).double(), variant.endswith("own key")
    query, keys, batch = some_rows(method)
    method.weighting = KINDS[kind]
    batch = replace(batch, same=KINDS[kind].same)
    mixture = pairs(candidates="own" if own else "batch")
    actual = method.mixed_loss(query, keys, mixture, batch)
    key, weighting = next(reversed(keys.values()))[0], KINDS[kind]
    if own:  # only rows of the queue are negatives
        weighting = replace(weighting, same=torch.zeros(6).long())
    scale = 4 * method.temperature if variant == "mocov3" else 1
    queue = method.queue.rows if variant.startswith("moco") and variant != "mocov3" else None
    extra = weighting, queue
    expected = scale * by_loops(mixture, lambda p, i: of_negatives(method, query, key, p, i, batch, *extra))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    head = method.online[0]
    torch.testing.assert_close(*(torch.autograd.grad(x, query[head])[0] for x in (actual, expected)))


def test_supcon_leaves_out_similar_samples_of_other_classes_than_a_mixed_ones() -> None:
    method = create("supcon").double()
    query, keys, batch = some_rows(method)
    method.weighting = KINDS["drop"]
    same, label, mixture = KINDS["drop"].same, [0, 1, 10, 11, 2, 12], pairs()
    keys = {"projection": keys["projection"]}
    batch = replace(batch, same=same, label=torch.tensor([0, 1, -1, -1, 2, -1]))
    u, t = unit(keys["projection"][0]), method.temperature

    def loss(p: int, i: int) -> Tensor:
        row = unit(query["projection"][i])
        among = [j for j in range(6) if same[j] != same[p] or label[j] == label[p]]
        positive = torch.stack([row @ u[j] / t for j in range(6) if label[j] == label[p]]).mean()
        return torch.stack([row @ u[j] / t for j in among]).logsumexp(0) - positive

    torch.testing.assert_close(method.mixed_loss(query, keys, mixture, batch), by_loops(mixture, loss))


def test_losses_with_a_statistic_have_that_of_mixed_rows_and_of_keys() -> None:
    """Only the distance of two views is shared by the two samples."""
    for alpha in (2.0, 1.0):
        method = METHODS["align_uniform"](alpha=alpha, out_dim=8)
        query, keys, batch = some_rows(method)
        mixture, q, k = pairs(), unit(query["projection"]), unit(keys["projection"][0])
        uniform = [align_uniform(torch.stack([x, x]))["uniformity"] for x in (q, k)]
        expected = by_loops(mixture, lambda p, i, q=q, k=k, a=alpha: (q[i] - k[p]).norm() ** a) + sum(uniform) / 2
        torch.testing.assert_close(method.mixed_loss(query, keys, mixture, batch), expected)
    method = METHODS["vicreg"](out_dim=8)
    query, keys, batch = some_rows(method)
    mixture, q, k = pairs(), query["projection"], keys["projection"][0]
    parts_of = [vicreg(torch.stack([x, x])) for x in (q, k)]
    expected = 25 * by_loops(mixture, lambda p, i: (q[i] - k[p]).square().mean())
    expected = expected + sum(25 * x["variance"] + x["covariance"] for x in parts_of) / 2
    torch.testing.assert_close(method.mixed_loss(query, keys, mixture, batch), expected)


def test_mixed_labels_are_counted_by_their_share() -> None:
    """Mixup: an unlabelled sample has no part in sum and count."""
    method = create("supervised")
    query, _, batch = some_rows(method)
    mixture, total, count = pairs(), 0.0, 0.0
    for i in range(4):
        for s in range(2):
            label, share = int(batch.label[mixture.positive[s, i]]), float(mixture.weight[s, i])
            if label >= 0:
                total, count = total - share * query["classifier"][i].log_softmax(0)[label], count + share
    torch.testing.assert_close(method.mixed_loss(query, {}, mixture, batch), total / count)


@pytest.mark.parametrize("variant", ["moco", "moco-symmetric", "mocov3", "byol", "simsiam", "dino", "relation",
                                     "relation-own", "supervised", "swav-plain", "vicreg", "pcl"])  # fmt: skip
def test_a_sample_mixed_with_itself_is_a_plain_one(variant: str) -> None:
    """The scale of the loss is that of plain rows. SimCLR, DCL and SupCon also have negatives of the same view."""
    method, n = create(variant).double(), 6
    _, keys, batch = some_rows(method)
    other = some_rows(method, 1)[1]
    own = torch.arange(n).expand(2, n)
    mixture = Mixture(own, torch.full((2, n), 0.5, dtype=torch.float64), "own")
    rows = {name: torch.randn(2, n, x.shape[1], dtype=torch.float64) for name, x in some_rows(method)[0].items()}
    views = list(method.online_views(2))
    target = {name: torch.cat([x, other[name]])[list(method.target_views(2))] for name, x in keys.items()}
    source = target if method.target else rows
    key_views = list(method.target_views(2)) if method.target else [0, 1]
    losses = []
    for i, v in enumerate(views):
        chosen = [j for j, w in enumerate(key_views) if (w == v) == (method.mixed_keys == "same")]
        query = {name: x[i] for name, x in rows.items()}
        losses.append(method.mixed_loss(query, {name: x[chosen] for name, x in source.items()}, mixture, batch))
    plain = method.loss({name: x[: len(views)] for name, x in rows.items()}, target, batch)["loss"]
    torch.testing.assert_close(torch.stack(losses).mean(), plain, rtol=1e-10, atol=1e-12)


def test_methods_state_whether_their_keys_learn() -> None:
    for name in METHODS:
        method = create(name)
        if method.mixed_keys != "other" or method.target:
            continue
        rows = {head: torch.randn(2, 16, 8, dtype=torch.float64, requires_grad=True) for head in method.online}
        pair = Mixture(torch.stack([torch.arange(16), torch.arange(16).flip(0)]), torch.full((2, 16), 0.5).double())
        query, keys = {head: x[0] for head, x in rows.items()}, {head: x[1:] for head, x in rows.items()}
        method.mixed_loss(query, keys, pair, replace(unlabelled(16), label=torch.arange(16) % 3)).backward()
        learns = any(x.grad is not None and x.grad[1].any() for x in rows.values())
        assert learns == method.keys_learn, name
