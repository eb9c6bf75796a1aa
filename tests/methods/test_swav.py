"""SwAV: Sinkhorn's codes, the swapped prediction, the queue, and prototypes that stay unit vectors."""

from pathlib import Path
from unittest.mock import patch

import pytest
import small_methods as small
import torch
from golden_vectors import DTYPES, Case
from torch import Tensor, nn

from inbatch.batch import Batch
from inbatch.data.views import PRESETS
from inbatch.losses import sinkhorn, swapped_prediction
from inbatch.methods.swav import SwAV
from inbatch.models import create_encoder
from inbatch.models.network import Network
from inbatch.nn.functional import normalize


def batch(n: int, epoch: int = 0) -> Batch:
    return Batch(torch.arange(n), torch.full((n,), -1), epoch=epoch)


def prepared(case: Case, queue: int = 0) -> tuple[SwAV, nn.ModuleDict]:
    """Return the method and its heads, with the vectors' prototypes and without a projection."""
    o = case.options
    method = SwAV(
        o["temperature"],
        o["epsilon"],
        o["sinkhorn_iterations"],
        o["prototypes"],
        queue_size=queue,
        queue_start_epoch=0,
        out_dim=o["dim"],
    ).to(case.dtype)
    heads = nn.ModuleDict({name: head.network for name, head in method.heads(8).items()}).to(case.dtype)
    heads["prototypes"].weight.data = case["prototypes_raw"].clone()
    method.on_weights(heads)
    return method, heads


def codes_of(method: SwAV, scores: Tensor, epoch: int = 0) -> Tensor:
    """Return the codes that the method's loss predicts."""
    with patch("inbatch.methods.swav.swapped_prediction", wraps=swapped_prediction) as seen:
        method.loss({"prototypes": scores}, {}, batch(scores.shape[1], epoch))
    return seen.call_args.args[1]


def test_codes_are_targets_and_get_no_gradient() -> None:
    scores = torch.randn(2, 5, 4, requires_grad=True)
    codes = torch.randn(2, 5, 4).softmax(2).requires_grad_()
    swapped_prediction(scores, codes).backward()
    assert codes.grad is None and scores.grad is not None


@DTYPES
@pytest.mark.parametrize("name", ["swav_sinkhorn__1", "swav_sinkhorn__2", "swav_sinkhorn__3"])
def test_sinkhorn(golden: Path, name: str, dtype: torch.dtype) -> None:
    case = Case(golden, name, dtype)
    scores = case.leaf("scores")
    codes = sinkhorn(scores, case.options["epsilon"], case.options["iterations"])
    case.check(codes, "codes")
    assert not codes.requires_grad


@DTYPES
@pytest.mark.parametrize("name", ["swav_loss__2crop", "swav_loss__multicrop"])
def test_swapped_prediction(golden: Path, name: str, dtype: torch.dtype) -> None:
    """Codes, value and gradients, from the scores, and through head and method."""
    case = Case(golden, name, dtype)
    o = case.options
    scores = case.leaf("scores")
    codes = sinkhorn(scores[:2], o["epsilon"], o["sinkhorn_iterations"])
    case.check(codes, "codes")
    loss = swapped_prediction(scores, codes, o["temperature"])
    case.check(loss, "loss")
    loss.backward()
    case.check(scores.grad, "grad_scores")

    method, heads = prepared(case)
    prototypes, z = heads["prototypes"], case.leaf("z")
    case.check(prototypes.weight, "prototypes")
    logits = prototypes(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    case.check(logits, "scores")
    loss = method.loss({"projection": z, "prototypes": logits}, {}, batch(z.shape[1]))["loss"]
    case.check(loss, "loss")
    loss.backward()
    case.check(z.grad, "grad_z")
    case.check(prototypes.weight.grad, "grad_prototypes")


@DTYPES
def test_queue_over_steps(golden: Path, dtype: torch.dtype) -> None:
    """Codes use the previous step's queue once it is full; inbatch has a ring, the reference the newest rows first."""
    case = Case(golden, "swav_queue__1", dtype)
    n, size = case.options["batch"], case.options["queue_length"]
    method, heads = prepared(case, size)
    case.check(heads["prototypes"].weight, "prototypes")
    for step in range(case.options["steps"]):
        z = case["z"][step].requires_grad_()
        scores = heads["prototypes"](z.flatten(0, 1)).unflatten(0, z.shape[:2])
        rows = {"projection": z, "prototypes": scores}
        codes = codes_of(method, scores)
        case.check(codes, "codes", step)
        alone = sinkhorn(scores[:2], method.epsilon, method.iterations)
        assert torch.equal(codes, alone) != bool(case.arrays["queue_used"][step])
        loss = method.loss(rows, {}, batch(n))["loss"]
        case.check(loss, "loss", step)
        loss.backward()
        case.check(z.grad, "grad_z", step)

        method.after_step({name: x.detach() for name, x in rows.items()}, {}, batch(n), 0.0)
        filled, newest = int(method.queue.filled), int(method.queue.pointer) - n
        assert filled == min(size, n * (step + 1))
        places = [(newest - back + i) % size for back in range(0, filled, n) for i in range(n)]
        kept = method.queue.rows[places].unflatten(1, (2, -1)).transpose(0, 1)
        torch.testing.assert_close(kept, case["queue"][step][:, :filled], **case.tolerance)


def literal_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Caron et al. 2020, appendix A.1, one column and one row at a time."""
    q = [[(score / epsilon).exp() for score in row] for row in scores]
    n, k = scores.shape
    for _ in range(iterations):
        for c in range(k):
            total = sum(row[c] for row in q)
            for row in q:
                row[c] = row[c] / total / k
        for row in q:
            total = sum(row)
            row[:] = [x / total / n for x in row]
    return torch.stack([torch.stack(row) for row in q]) * n


def literal_swapped(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Eq. 2 over all pairs, one sample at a time."""
    terms = []
    for i in range(len(codes)):
        for v in range(len(scores)):
            if v != i:
                for n in range(scores.shape[1]):
                    p = (scores[v, n] / temperature).exp()
                    terms.append(-sum(codes[i, n, k] * (p[k] / p.sum()).log() for k in range(len(p))))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("views", [2, 4])
def test_the_equations_as_loops(views: int) -> None:
    scores = torch.rand(views, 5, 3, dtype=torch.float64, requires_grad=True)
    codes = sinkhorn(scores[:2], 0.1, 4)
    for actual, row in zip(codes, scores.detach()[:2], strict=True):
        torch.testing.assert_close(actual, literal_sinkhorn(row, 0.1, 4), rtol=1e-9, atol=1e-12)
    actual, expected = swapped_prediction(scores, codes, 0.2), literal_swapped(scores, codes, 0.2)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    (a,), (b,) = torch.autograd.grad(actual, scores), torch.autograd.grad(expected, scores)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_of_scores_that_no_exponential_holds(dtype: torch.dtype) -> None:
    """exp(scores / epsilon) overflows above 4.5 at 0.05 in float32: the sums are computed in logarithms."""
    codes = sinkhorn((1e3 * torch.randn(6, 4)).to(dtype), 0.05, 50)
    assert codes.dtype == torch.float32 and codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(6))


def test_prototypes_are_used_equally_after_many_iterations() -> None:
    codes = sinkhorn(torch.randn(12, 4, dtype=torch.float64), 0.5, 200)
    torch.testing.assert_close(codes.sum(0), torch.full((4,), 3.0, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(1), torch.ones(12, dtype=torch.float64))


def test_prototypes_are_unit_vectors_after_every_step_and_learn_when_they_may() -> None:
    method, network, _ = small.parts("swav")
    before = network.heads["prototypes"].weight.detach().clone()
    for epoch, moved in ((0, False), (1, True)):
        method.freeze_prototypes_epochs = 1
        images = next(small.batches(8, 1, 2))[1]
        method.loss(network(images), {}, batch(8, epoch))["loss"].backward()
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0, weight_decay=0.1)
        method.on_gradients(network.heads, batch(8, epoch), 0.0)
        optimizer.step()
        optimizer.zero_grad()
        method.on_weights(network.heads)
        weight = network.heads["prototypes"].weight.detach()
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(6, dtype=torch.float64))
        assert torch.allclose(weight, before) != moved
        assert torch.equal(method.vectors, weight)


def test_the_queue_s_scores_are_those_of_the_current_prototypes() -> None:
    method, network, _ = small.parts("swav")
    (_, images), (_, more) = small.batches(16, 2, 2)
    with torch.no_grad():
        rows, later = network(images), network(more)
        method.after_step(rows, {}, batch(16), 0.0)
        network.heads["prototypes"].weight.copy_(torch.randn(6, 8))
        method.on_weights(network.heads)
    scores = network.heads["prototypes"](torch.cat([rows["projection"], later["projection"]], 1).flatten(0, 1))
    whole = sinkhorn(scores.unflatten(0, (2, -1)), method.epsilon, method.iterations)
    torch.testing.assert_close(codes_of(method, scores.unflatten(0, (2, -1))[:, 16:]), whole[:, 16:])


def test_the_queue_waits_for_its_epoch_and_until_it_is_full() -> None:
    method = SwAV(num_prototypes=6, queue_size=10, queue_start_epoch=2, hidden_dim=8, out_dim=8)
    method.heads(12)
    scores = torch.randn(2, 8, 6)
    rows = {"projection": torch.randn(2, 8, 8), "prototypes": scores}
    alone = sinkhorn(scores, 0.05, 3)
    for epoch, filled, used in ((1, 0, False), (2, 8, False), (2, 10, True)):
        method.after_step(rows, {}, batch(8, epoch), 0.0)
        assert method.queue.filled == filled
        assert torch.equal(codes_of(method, scores, epoch), alone) != used
    assert torch.equal(method.queue.rows[:2, 8:], normalize(rows["projection"][1])[2:4])


@pytest.mark.parametrize(
    "call",
    [
        lambda: sinkhorn(torch.randn(4, 3), 0.05, 0),
        lambda: sinkhorn(torch.randn(0, 3), 0.05, 3),
        lambda: swapped_prediction(torch.randn(1, 4, 3), torch.rand(1, 4, 3)),
        lambda: swapped_prediction(torch.randn(2, 4, 3), torch.rand(3, 4, 3)),
        lambda: swapped_prediction(torch.randn(2, 4, 3), torch.rand(0, 4, 3)),
    ],
    ids=["no iteration", "no rows", "one view", "more codes than views", "no codes"],
)
def test_invalid_input_is_refused(call) -> None:
    with pytest.raises(ValueError, match=r"Sinkhorn|predicts"):
        call()


@pytest.mark.parametrize("joined", [False, True])
def test_small_views_of_another_size_predict_and_are_not_assigned(joined: bool) -> None:
    """2 views of 32 pixels and 4 of 16; if joined, those of one size run through the encoder together."""
    method = SwAV(num_prototypes=6, hidden_dim=8, out_dim=8)
    encoder = create_encoder("tiny", size=32, channels=3)
    network = Network(encoder, method.heads(encoder.width), method.online, joined=joined)
    runs = []
    encoder.register_forward_hook(lambda module, inputs, out: runs.append(len(out)))
    sizes = [view.size for view in PRESETS["swav_cifar"]()]
    rows = network([torch.randn(4, 3, size, size) for size in sizes])
    assert sizes == [32, 32, 16, 16, 16, 16] and runs == ([8, 16] if joined else [4] * 6)
    assert codes_of(method, rows["prototypes"]).shape == (2, 4, 6)
    rows["prototypes"].retain_grad()
    method.loss(rows, {}, batch(4))["loss"].backward()
    assert rows["prototypes"].grad.abs().sum((1, 2)).min() > 0
    assert all(p.grad.isfinite().all() for p in network.parameters())
