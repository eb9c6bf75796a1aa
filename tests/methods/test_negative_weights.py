"""Which samples are negatives, and how they count, in the equation of every method that the plug-in fits."""

import math
from collections.abc import Callable

import pytest
import torch
from test_hcl import literal, rows
from torch import Tensor

from inbatch.losses import ctr, dcl, hcl, info_nce, nnclr, nt_xent, supcon
from inbatch.methods.cc import contrast
from inbatch.nn import logsumexp
from inbatch.nn.functional import normalize
from inbatch.nn.negatives import Negatives

SAME = [0, 1, 1, 3, 0, 5]
KINDS = {
    "drop": Negatives(torch.tensor(SAME)),
    "debias": Negatives(tau_plus=0.1),
    "hard": Negatives(tau_plus=0.1, beta=1.0),
    "both": Negatives(torch.tensor(SAME), 0.1, 1.0),
}
T = 0.4


def log_sum(q: Tensor, keys: list[Tensor], positive: Tensor, kind: Negatives) -> Tensor:
    """Return log Ng of one query, from the products with its negatives."""
    e = torch.stack([(q @ key / T).exp() for key in keys])
    if kind.tau_plus is None:
        return e.sum().log()
    weight = e**kind.beta
    total = (e * weight).sum() / weight.mean() - kind.tau_plus * len(e) * (positive / T).exp()
    return (total / (1 - kind.tau_plus)).clamp(min=len(e) * math.exp(-1 / T)).log()


def across(q: Tensor, k: Tensor, kind: Negatives, keys_of: tuple[Tensor, ...], own: bool = True) -> Tensor:
    """Return the mean of log(own positive + negatives) - positive, one query at a time."""
    terms = []
    for i in range(len(q)):
        same = list(range(len(q))) if kind.same is None else SAME
        others = [view[j] for view in keys_of for j in range(len(q)) if same[j] != same[i]]
        positive = q[i] @ k[i]
        negative = log_sum(q[i], others, positive, kind)
        terms.append((torch.logaddexp(positive / T, negative) if own else negative) - positive / T)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("name", KINDS)
def test_every_equation_as_loops(name: str) -> None:
    kind, z = KINDS[name], rows(2, 6, 3)
    in_batch = value_and_gradient(
        z, lambda z: literal(z, T, kind.tau_plus, kind.beta, None if kind.same is None else SAME)
    )
    for loss in (nt_xent(z.requires_grad_(), T, "mean", kind), contrast(z, T, kind)):
        assert_equal((loss, torch.autograd.grad(loss, z)[0]), in_batch)
    keys = {
        "dcl": (lambda z: dcl(z, T, None, False, False, kind), lambda u: across(*u, kind, (*u,), False)),
        "ctr": (lambda z: ctr(*z, T, kind) / (2 * T), lambda u: across(u[0], u[1].detach(), kind, (u[1].detach(),))),
        "nnclr": (lambda z: nnclr(*z, T, "one_way", kind), lambda u: across(u[0].detach(), u[1], kind, (u[1],))),
    }
    for loss, expected in keys.values():
        loops = value_and_gradient(z, lambda z, expected=expected: expected(normalize(z)))
        assert_equal(value_and_gradient(z, loss), loops)
    both_ways = value_and_gradient(z, lambda z: nnclr(*z, T, "nt_xent", kind))
    assert_equal((both_ways[0], both_ways[1][1]), (in_batch[0], in_batch[1][1]))
    assert not both_ways[1][0].any()  # neighbours carry no gradient


def value_and_gradient(z: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    leaf = z.detach().clone().requires_grad_()
    value = loss(leaf)
    return value, torch.autograd.grad(value, leaf)[0]


def assert_equal(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-9, atol=1e-12)


def test_simclr_with_hard_negatives_is_hcl() -> None:
    z = rows(3, 6, 4)
    assert torch.equal(nt_xent(z, T, "mean", KINDS["hard"]), hcl(z, T, 0.1, 1.0))
    assert torch.equal(nt_xent(z, T, "mean", KINDS["debias"]), hcl(z, T, 0.1, 0.0))
    assert torch.equal(nt_xent(z, T, "mean", KINDS["both"]), hcl(z, T, 0.1, 1.0, KINDS["drop"]))


@pytest.mark.parametrize("name", ["debias", "hard"])
def test_the_keys_of_a_queue_are_all_negatives(name: str) -> None:
    kind = KINDS[name]
    q, k = rows(2, 5, 3)
    queue = normalize(rows(7, 3, seed=1))
    u, w = normalize(q), normalize(k)
    terms = []
    for i in range(5):
        negative = log_sum(u[i], list(queue), u[i] @ w[i], kind)
        terms.append(torch.logaddexp(u[i] @ w[i] / T, negative) - u[i] @ w[i] / T)
    torch.testing.assert_close(info_nce(q, k, queue, T, negatives=kind), torch.stack(terms).mean(), rtol=1e-12, atol=0)


def test_supcon_leaves_out_similar_samples_of_other_classes() -> None:
    z, label = rows(2, 6, 3).requires_grad_(), torch.tensor([0, 1, 0, -1, 0, 1])
    u = normalize(z).flatten(0, 1)
    classes = [0, 1, 0, 10, 0, 1] * 2
    terms = []
    for i in range(12):
        among = [j for j in range(12) if j != i and (SAME[j % 6] != SAME[i % 6] or classes[j] == classes[i])]
        total = torch.stack([u[i] @ u[j] / T for j in among]).logsumexp(0)
        positives = [j for j in range(12) if j != i and classes[j] == classes[i]]
        terms.append(sum(total - u[i] @ u[j] / T for j in positives) / len(positives))
    expected = sum(terms) / len(terms)
    actual = supcon(z, label, T, T, negatives=KINDS["drop"])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, z, retain_graph=True)[0] for x in (actual, expected)))
    assert supcon(z, label, T, T) > actual


@pytest.mark.parametrize("mode", ["never", "always"])
def test_a_batch_of_one_group_has_no_negatives_and_finite_gradients(mode: str) -> None:
    for kind in (Negatives(torch.zeros(6).long()), Negatives(torch.zeros(6).long(), 0.1, 1.0)):
        z = rows(2, 6, 3).requires_grad_()
        with logsumexp.using(mode=mode):
            zero = [nt_xent(z, T, "mean", kind), contrast(z, T, kind), ctr(*z, T, kind), nnclr(*z, T, "one_way", kind)]
            pulled = dcl(z, T, negatives=kind)
            alone = supcon(z[:1], torch.arange(6), T, negatives=kind)
        assert all(abs(float(loss.detach())) < 1e-12 for loss in (*zero, alone))
        torch.testing.assert_close(pulled, -(normalize(z)[0] * normalize(z)[1]).sum(-1).mean() / T)
        gradients = torch.autograd.grad(sum(zero) + pulled + alone, z)[0]
        assert gradients.isfinite().all()


def test_no_matrix_is_held_and_ranks_share_the_tiles() -> None:
    same = torch.arange(200) // 3
    z, values = rows(2, 200, 4), []
    for mode in ("never", "always"):
        leaf, kept = z.clone().requires_grad_(), list[int]()
        with (
            logsumexp.using(mode=mode),
            torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x),
        ):
            loss = nt_xent(leaf, 0.2, "mean", Negatives(same))
        loss.backward()
        values.append((loss.detach(), leaf.grad, max(kept)))
    assert values[1][2] <= 400 * 4 < values[0][2]
    torch.testing.assert_close(values[1][0], values[0][0], rtol=1e-12, atol=0)
    torch.testing.assert_close(values[1][1], values[0][1], rtol=1e-9, atol=1e-14)
