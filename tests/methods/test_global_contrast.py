"""SogCLR and iSogCLR: the authors' vectors over steps, the equations as loops, and one number per sample."""

import math
from pathlib import Path

import pytest
import small_methods as small
import torch
from golden_vectors import DTYPES, Case
from rank_pool import on_ranks
from step_states import N, assert_same
from torch import Tensor

from inbatch.batch import Batch, split_state
from inbatch.losses import dcl, isogclr, sogclr
from inbatch.methods.isogclr import ISogCLR
from inbatch.methods.sogclr import SogCLR
from inbatch.nn import logsumexp, tiles
from inbatch.nn.functional import normalize
from inbatch.nn.global_contrast import global_contrast
from inbatch.training.optim import scaled_lr
from inbatch.training.recipe import make


def literal(z: Tensor, u: Tensor, tau: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss, new estimates (n), and the weighted means of the similarities (2, n), one pair at a time."""
    h = z / z.norm(dim=-1, keepdim=True)
    n, total, new, means = len(u), 0, torch.zeros(2, len(u), dtype=z.dtype), torch.zeros(2, len(u), dtype=z.dtype)
    for i in range(n):
        for v in (0, 1):
            others = [h[v, i] @ h[w, j] for w in (0, 1) for j in range(n) if j != i]
            g = sum((s.detach() / tau[i]).exp() for s in others) / len(others)
            new[v, i] = (1 - gamma) * u[i] + gamma * g
            weighted = sum((s.detach() / tau[i]).exp() / new[v, i] * s for s in others) / len(others)
            means[v, i] = weighted.detach()
            total = total + weighted - h[v, i] @ h[1 - v, i]
    return total / n, new.mean(0), means


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(index: Tensor, epoch: int = 0) -> Batch:
    return Batch(index, torch.full_like(index, -1), epoch=epoch)


@DTYPES
def test_vectors_of_sogclr(golden: Path, dtype: torch.dtype) -> None:
    """Value, gradients and every sample's u over five steps, two of them with samples that were never seen."""
    case = Case(golden, "sogclr_steps__1", dtype)
    o = case.options
    method = SogCLR(o["temperature"], o["gamma"])
    method.prepare(images=o["dataset"])
    method.to(dtype)
    for step in range(o["steps"]):
        z1, z2 = (case[name][step].requires_grad_() for name in ("z1", "z2"))
        losses, state = split_state(
            method.loss({"projection": torch.stack([z1, z2])}, {}, batch_of(case["index"][step], step))
        )
        case.check(losses["loss"], "loss", step)
        losses["loss"].backward()
        case.check(z1.grad, "grad_z1", step)
        case.check(z2.grad, "grad_z2", step)
        method.store(state)
        case.check(method.log_u.exp(), "u_after", step)


@DTYPES
def test_vectors_of_isogclr(golden: Path, dtype: torch.dtype) -> None:
    """Value, gradients, and every sample's s, temperature and averaged gradient of it, over four steps."""
    case = Case(golden, "isogclr_steps__1", dtype)
    o = case.options
    method = ISogCLR(o["tau_init"], o["tau_min"], o["tau_max"], o["rho"], o["eta"], o["beta_u"], o["grad_clip"],
                     o["gamma"])  # fmt: skip
    method.prepare(images=o["dataset"])
    method.to(dtype).tau.fill_(o["tau_init"])
    for step in range(o["steps"]):
        z1, z2 = (case[name][step].requires_grad_() for name in ("z1", "z2"))
        index = case["index"][step]
        case.check(method.tau[index], "tau_used", step)
        batch = batch_of(index, int(case["epoch"][step]))
        losses, state = split_state(method.loss({"projection": torch.stack([z1, z2])}, {}, batch))
        case.check(losses["loss"], "loss", step)
        losses["loss"].backward()
        case.check(z1.grad, "grad_z1", step)
        case.check(z2.grad, "grad_z2", step)
        method.store(state)
        for name, array in (("log_s", "s_after"), ("tau", "tau_after"), ("slope", "u_after")):
            case.check(getattr(method, name).exp() if name == "log_s" else getattr(method, name), array, step)


@pytest.mark.parametrize("mode", ["never", "always"])
def test_the_equation_as_loops(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one temperature and with one per sample, with and without average, plain and in tiles of 2 rows."""
    monkeypatch.setattr(tiles, "TILE", 2)
    z, u = draw(2, 5, 3), draw(5, seed=1).exp()
    for tau, gamma in ((torch.full((5,), 0.3, dtype=torch.float64), 0.7), (0.2 + 0.1 * torch.arange(5).double(), 1.0)):
        ours, plain = z.clone().requires_grad_(), z.clone().requires_grad_()
        with logsumexp.using(mode=mode):
            loss, log_s, slope = isogclr(ours, u.log(), tau, gamma, 0.4)
            if gamma < 1:
                same, log_u = sogclr(ours, u.log(), 0.3, gamma)
                assert torch.equal(same, loss) and torch.equal(log_u, log_s)
        expected, new, means = literal(plain, u, tau, gamma)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(log_s.exp(), new, rtol=1e-12, atol=0)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=1e-14)
        h = z / z.norm(dim=-1, keepdim=True)
        both = torch.stack([
            torch.stack([torch.cat([h[v, i] @ h[w].T for w in (0, 1)])[torch.arange(10) % 5 != i] for i in range(5)])
            for v in (0, 1)
        ])  # fmt: skip
        g = (both / tau[:, None]).exp().mean(-1)
        e = (1 - gamma) * u + gamma * g
        torch.testing.assert_close(slope, (e.log() + 0.4 - means / tau).mean(0), rtol=1e-12, atol=0)


def test_the_gradient_is_that_of_the_global_objective() -> None:
    """Finite differences of the mean of T log g - h . h', where the estimate is the batch's own (gamma 1).

    The temperatures' gradient is the derivative of tau (log s + rho) by tau.
    """
    t, nothing = 0.4, torch.full((4,), -math.inf, dtype=torch.float64)

    def objective(z: Tensor, tau: float) -> Tensor:
        h = normalize(z)
        pairs = torch.einsum("vid,wjd->viwj", h, h)
        pairs = pairs.masked_fill(torch.eye(4).bool()[None, :, None], -math.inf).flatten(2)
        g = torch.logsumexp(pairs / tau, -1) - math.log(6)
        return (tau * g).sum(0) - 2 * (h[0] * h[1]).sum(-1)

    def with_its_value(z: Tensor) -> Tensor:
        loss = sogclr(z, nothing, t, 1.0)[0]
        return loss - loss.detach() + objective(z, t).mean().detach()

    z = draw(2, 4, 3)
    assert torch.autograd.gradcheck(with_its_value, z.clone().requires_grad_())
    slope, step = isogclr(z, nothing, torch.full((4,), t, dtype=torch.float64), 1.0, 0.4)[2], 1e-5
    difference = (objective(z, t + step) - objective(z, t - step)) / (2 * step) / 2
    torch.testing.assert_close(slope, difference + 0.4, rtol=1e-7, atol=0)


def test_gamma_1_gives_dcl() -> None:
    """gamma = 1: T times the gradient of the decoupled contrastive loss, both directions added."""
    ours, theirs = draw(2, 6, 4).requires_grad_(), draw(2, 6, 4).requires_grad_()
    sogclr(ours, draw(6), 0.5, 1.0)[0].backward()
    dcl(theirs, 0.5).backward()
    torch.testing.assert_close(ours.grad, theirs.grad * (2 * 0.5), rtol=1e-10, atol=1e-14)


def test_a_batch_is_weighed_by_the_estimate_of_the_data_set() -> None:
    """Negatives that are closer than a sample's usual ones push more, at most 1 / gamma times as much."""
    method, index = SogCLR(0.5, gamma=0.2), torch.tensor([5, 0, 7, 2])
    method.prepare(images=8)
    method.double()

    def push() -> Tensor:
        leaf = draw(2, 4, 3).requires_grad_()
        h = normalize(leaf)
        loss = method.loss({"projection": leaf}, {}, batch_of(index))["loss"] + 2 * (h[0] * h[1]).sum(-1).mean()
        return torch.autograd.grad(loss, leaf)[0]

    first = push()
    state = split_state(method.loss({"projection": draw(2, 4, 3)}, {}, batch_of(index)))[1]
    assert torch.equal(state["log_u"].isfinite().nonzero()[:, 0], index.sort().values)
    for log_u, factor in ((-100.0, 5.0), (100.0, 0.0)):
        method.log_u.fill_(log_u)
        torch.testing.assert_close(push(), factor * first)


def test_first_time_rules() -> None:
    """ "batch": no average if no sample was seen; "epoch": none in the first epoch, always one afterwards."""
    rows, index = {"projection": draw(2, 4, 3)}, torch.arange(4)

    def estimates(first: str, seen: float, epoch: int) -> Tensor:
        method = SogCLR(0.5, gamma=0.2, first=first)
        method.prepare(images=4)
        method.double().log_u[3] = seen
        return method.loss(rows, {}, batch_of(index, epoch))["state.log_u"]

    fresh = estimates("batch", -math.inf, 5)
    torch.testing.assert_close(estimates("epoch", 0.0, 0), fresh)
    torch.testing.assert_close(estimates("epoch", -math.inf, 1), fresh + math.log(0.2))
    torch.testing.assert_close(estimates("batch", 0.0, 0)[:3], fresh[:3] + math.log(0.2))


def test_temperatures_stay_in_their_range_and_the_clip_is_optional() -> None:
    rows, batch = {"projection": draw(2, 4, 3)}, batch_of(torch.arange(4))
    slopes = []
    for clip in (0.1, None):
        method = ISogCLR(0.3, tau_max=0.31, rho=-5.0, eta=10.0, clip=clip)
        method.prepare(images=4)
        state = split_state(method.double().loss(rows, {}, batch))[1]
        assert torch.equal(state["tau"], torch.full_like(state["tau"], 0.31))
        slopes.append(state["slope"])
    torch.testing.assert_close(slopes[0], torch.full_like(slopes[0], -0.09))
    assert slopes[1].abs().min() > 1


def test_no_matrix_is_held() -> None:
    z, kept = draw(2, 300, 4).requires_grad_(), list[int]()
    with (
        logsumexp.using(mode="always"),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x),
    ):
        sogclr(z, torch.zeros(300), 0.2)[0].backward()
    assert max(kept) <= 2 * 300 * 4
    assert z.grad.isfinite().all()


def test_every_rank_holds_the_numbers_of_all_samples() -> None:
    """After two steps on two ranks the state is that of one process, and only of the samples of these steps."""
    for variant, key in (("isogclr", "method.log_s"), ("tico", "method.covariance")):
        expected = small.train(variant, N, 2)
        for state in on_ranks(2, small.train, variant, N, 1):
            assert_same({key: state[key]}, {key: expected[key]})
            assert variant == "tico" or sum(math.isfinite(x) for x in state[key]) == 2 * N
            assert state.keys() == expected.keys()


def test_wrong_options_and_batches_are_refused() -> None:
    for method in (SogCLR, ISogCLR):
        with pytest.raises(ValueError, match="at most 1"):
            method(gamma=0.0)
    for wrong in ({"tau_min": 0.0}, {"temperature": 2.0}, {"tau_min": 1.0, "tau_max": 0.05}, {"temperature": 0.01}):
        with pytest.raises(ValueError, match="temperature"):
            ISogCLR(**wrong)
    for wrong in ({"clip": 0.0}, {"clip": -1.0}, {"eta": -1.0}):
        with pytest.raises(ValueError, match="eta"):
            ISogCLR(**wrong)
    for shape in ((2, 1, 3), (1, 4, 3), (3, 4, 3)):
        with pytest.raises(ValueError, match="2 views of at least 2 samples"):  # a third view was left out
            global_contrast(torch.ones(shape), torch.zeros(shape[1]), 0.1, 0.9)


def test_a_sample_twice_in_a_batch_has_one_number_in_any_order() -> None:
    """An unreadable image can be replaced by one that a sampler has put into the batch already."""
    rows, index = draw(2, 5, 3), torch.tensor([3, 1, 3, 0, 3])
    for method in (SogCLR(0.5), ISogCLR(0.5)):
        method.prepare(images=6)
        method.double()
        states = [
            split_state(method.loss({"projection": rows[:, order]}, {}, batch_of(index[order])))[1]
            for order in (torch.arange(5), torch.tensor([4, 2, 1, 3, 0]), torch.tensor([2, 0, 4, 3, 1]))
        ]
        for name, numbers in states[0].items():
            for other in states[1:]:
                torch.testing.assert_close(other[name], numbers, rtol=1e-12, atol=0)


def test_the_rate_of_the_cifar_preset_follows_the_batch() -> None:
    """0.8 for 128 images, as published; a folder of 50 photographs has smaller batches."""
    recipe = make({"data": "digits-canvas", "method.name": "isogclr", "preset": "cifar"})
    rates = [scaled_lr(recipe.optimizer.options["lr"], batch, recipe.schedule.scaling) for batch in (128, 16)]
    assert recipe.batch_size == 128 and rates == pytest.approx([0.8, 0.1])
