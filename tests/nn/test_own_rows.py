"""Losses of own rows: W ranks that pass rows on give the values and gradients of one process."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from rank_threads import ThreadPeers, on_threads
from small_methods import NEGATIVES, VARIANTS, batches, parts, views_of
from torch import Tensor

from inbatch import losses
from inbatch.batch import split_state
from inbatch.methods import METHODS
from inbatch.methods.simclr import SimCLR
from inbatch.nn import exponentials, logsumexp, passing, row_blocks, tiles, triton_logsumexp
from inbatch.nn.batch_sums import positions
from inbatch.nn.pair_weights import SameGroup

N = 24


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, also partial ones, in small blocks."""
    monkeypatch.setattr(tiles, "TILE", 3)
    monkeypatch.setattr(tiles, "APART", 2**60)
    monkeypatch.setattr(row_blocks, "_CHUNK", 20)
    monkeypatch.setattr(passing, "PIECE", 7)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sizes(world: int, even: bool) -> list[int]:
    """Return the samples of every rank; uneven: the first has one, or none, and the others more and more."""
    if even:
        return [N // world] * world
    first = [3 * i + (world == 2) for i in range(world - 1)]
    return [*first, N - sum(first)]


def group(n: int) -> Tensor:
    return torch.arange(n) * 7 % 5


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nt_xent": lambda z, place: losses.nt_xent(z, 0.1),
    "nt_xent, large logits": lambda z, place: losses.nt_xent(z, 1e-3),
    "nt_xent, groups": lambda z, place: losses.nt_xent(
        z, 0.1, negatives=replace(NEGATIVES["hard"], same=group(N)[place])),
    "supcon": lambda z, place: losses.supcon(z, (group(N) - 1)[place], 0.1),
    "supcon, groups": lambda z, place: losses.supcon(
        z, (group(N) - 1)[place], 0.1, contrast_mode="one", negatives=replace(NEGATIVES["group"], same=place // 3)),
    "keys without gradient": lambda z, place: losses.ctr(z[0], z[1], 0.2),
    "queries without gradient": lambda z, place: losses.nnclr(z[0], z[1], 0.1),
    "two sets": lambda z, place: losses.dcl(z, 0.1, sigma=0.5),
    "sigmoid": lambda z, place: losses.pairwise_sigmoid(z, 5.0, -3.0),
    "sigmoid, groups": lambda z, place: losses.pairwise_sigmoid(z, 5.0, -3.0, group(N)[place]),
    "koleo": lambda z, place: losses.koleo(z),
    "barlow twins": lambda z, place: losses.barlow_twins(z)["loss"],
    "vicreg": lambda z, place: losses.vicreg(z)["loss"],
}  # fmt: skip


def compare(compute: Callable[[Tensor, Tensor], Tensor], z: Tensor, world: int, even: bool, mode: str) -> None:
    leaf, parts_of = z.clone().requires_grad_(), sizes(world, even)
    with logsumexp.using(mode="never"):
        expected = compute(leaf, torch.arange(N))
        expected.backward()

    def own(rank: int) -> tuple[Tensor, Tensor]:
        mine = z.split(parts_of, 1)[rank].clone().requires_grad_()
        value = compute(mine, positions(mine.shape[1], z.device))
        value.backward()
        return value.detach(), mine.grad

    results = on_threads(world, own, mode=mode)
    for value, _ in results:
        torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
        assert torch.equal(value, results[0][0]), "equal bits on all ranks"
    torch.testing.assert_close(torch.cat([g for _, g in results], 1) / world, leaf.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.grid(14)
@pytest.mark.parametrize("mode", ["always", "never"])
@pytest.mark.parametrize(("world", "even"), [(2, True), (3, False), (4, True), (4, False)])
@pytest.mark.parametrize("name", LOSSES)
def test_own_rows_give_the_loss_of_the_whole_batch(name: str, world: int, even: bool, mode: str) -> None:
    compare(LOSSES[name], rows(2, N, 5), world, even, mode)


@pytest.mark.grid(28)
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if METHODS[VARIANTS[name][0]].own_rows])
def test_every_method_gives_the_same_from_own_rows(variant: str, world: int) -> None:
    """Losses, next states, memory and gradients."""
    views = views_of(variant)
    method, network, target = parts(variant)
    batch, images = next(batches(N, 1, views))
    with torch.no_grad():
        online = network([images[v] for v in method.online_views(views)], list(method.online_views(views)))
        numbers = list(method.target_views(views))
        taught = {} if target is None else target([images[v] for v in numbers], numbers)

    def step(method, online, taught, batch):  # type: ignore[no-untyped-def]
        leaves = {name: x.clone().requires_grad_() for name, x in online.items()}
        terms, state = split_state(method.loss(leaves, taught, batch))
        terms["loss"].backward()
        with torch.no_grad():
            method.store(state)
            method.after_step(online, taught, batch, 0.5)
        gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
        return {name: x.detach() for name, x in terms.items()}, gradients, method.state_dict()

    expected = step(copy.deepcopy(method), online, taught, batch)
    size = N // world

    def own(rank: int):  # type: ignore[no-untyped-def]
        mine = slice(rank * size, (rank + 1) * size)
        part = [{name: x[:, mine] for name, x in named.items()} for named in (online, taught)]
        return step(copy.deepcopy(method), *part, batch.take(mine))

    results = on_threads(world, own)
    for terms, _, state in results:
        torch.testing.assert_close(terms, expected[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state, expected[2], rtol=1e-12, atol=1e-12)
        assert all(torch.equal(x, results[0][0][name]) for name, x in terms.items())
    for name, gradient in expected[1].items():
        whole = torch.cat([gradients[name] for _, gradients, _ in results], 1) / world
        torch.testing.assert_close(whole, gradient, rtol=1e-11, atol=1e-12)


WITHOUT_SAMPLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigreg": lambda z, place: losses.sigreg(z, rows(5, 7)),
    "visreg": lambda z, place: losses.visreg(z, rows(5, 7))["loss"],
    "mmcr": lambda z, place: losses.mmcr(z, lmbda=0.1)["loss"],
    "swapped prediction": lambda z, place: losses.swapped_prediction(z, losses.sinkhorn(z)),
    "proto_nce": lambda z, place: losses.proto_nce(
        z[0], torch.cat([rows(N, 5)[place], rows(4, 5)]), torch.ones(len(place) + 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_SAMPLES)
def test_a_rank_may_have_no_samples(name: str) -> None:
    """It would raise an error, and the others would wait for it."""
    compare(WITHOUT_SAMPLES[name], rows(2, N, 5), 3, False, "never")


def kernel_sums(q, k, scale, exclude_self, start, stop, mean, products, weights):  # type: ignore[no-untyped-def]
    """Compute `triton_logsumexp.forward` literally."""
    s = exponentials.logits(q, k, scale, exclude_self, weights)[start:stop]
    return s.logsumexp(1), s.softmax(1) @ k if mean else None


def kernel_gradient(a, b, scale, exclude_self, start, stop, lse_a, grad_a, lse_b, grad_b, products, weights):  # type: ignore[no-untyped-def]
    """Compute `triton_logsumexp.backward` literally."""
    s, w = exponentials.logits(a, b, scale, exclude_self, weights), torch.zeros(len(a), len(b)).to(a)
    w += 0 if lse_a is None else grad_a[:, None] * (s - lse_a[:, None]).exp()
    w += 0 if lse_b is None else grad_b * (s - lse_b).exp()
    return (scale * w @ b)[start:stop]


KERNELS = [
    "nt_xent",
    "keys without gradient",
    "queries without gradient",
    "two sets",
    "nt_xent, groups",
    "supcon, groups",
]


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_are_given_both_sides_of_a_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        row_blocks, "on_kernels", lambda q, k, weights: weights is None or isinstance(weights, SameGroup)
    )
    monkeypatch.setattr(triton_logsumexp, "forward", kernel_sums)
    monkeypatch.setattr(triton_logsumexp, "backward", kernel_gradient)
    compare(LOSSES[name], rows(2, N, 5), 4, True, "always")


@pytest.mark.parametrize("world", [2, 3, 4])
def test_rank_sends_the_stated_number_of_bytes(world: int) -> None:
    """Of a log-sum-exp of rows with themselves, W / 2 blocks of three times own rows; no rank gathers any row."""

    def own(rank: int) -> dict[str, int]:
        z = rows(2, N // world, 5, seed=rank).requires_grad_()
        losses.nt_xent(z, 0.1).backward()
        peers = tiles.PLAN.get().peers
        assert isinstance(peers, ThreadPeers)
        return peers.sent

    numbers = world // 2 * (2 * N // world) * 3 * (5 + 1)
    assert on_threads(world, own) == [{"add": 1, "gather": 0, "exchange": numbers}] * world


@pytest.mark.parametrize(
    ("loss", "numbers"), [(losses.barlow_twins, 5**2 + 8 * 5), (losses.vicreg, 2 * 5**2 + 6 * 5 + 1)]
)
def test_gradients_that_every_rank_has_are_not_sent(loss: Callable[..., dict[str, Tensor]], numbers: int) -> None:
    """Matrices of D x D are added up once, not again in the backward pass; of Barlow Twins, gradients of 2 D are."""

    def own(rank: int) -> dict[str, int]:
        loss(rows(2, N // 3, 5, seed=rank).requires_grad_())["loss"].backward()
        peers = tiles.PLAN.get().peers
        assert isinstance(peers, ThreadPeers)
        return peers.sent

    assert on_threads(3, own) == [{"add": numbers, "gather": 0, "exchange": 0}] * 3


def test_weights_of_own_rows_only_are_refused() -> None:
    class Own:
        def tile(self, rows: slice, columns: slice) -> Tensor:
            return torch.ones(rows.stop - rows.start, columns.stop - columns.start)

    def own(rank: int) -> Tensor:
        return logsumexp.logsumexp(rows(4, 3), rows(4, 3), 0.1, weights=Own())

    with pytest.raises(ValueError, match="Own has no weights for keys of other ranks: define `keys` and `among`"):
        on_threads(2, own)
    with pytest.raises(ValueError, match="a mask holds the pairs of the whole batch"):
        on_threads(2, lambda rank: losses.supcon(rows(2, 4, 3), mask=torch.ones(4, 4)))


def test_a_rank_that_is_not_finite_makes_all_losses_nan() -> None:
    """So all ranks stop with the same error."""

    def own(rank: int) -> list[float]:
        z = rows(2, 4, 5, seed=rank)
        z[0, 0, 0] = float("nan") if rank == 1 else 1.0
        computed = losses.nt_xent(z, 0.1), losses.vicreg(z)["loss"], losses.pairwise_sigmoid(z)
        return [float(x) for x in computed]

    assert all(x != x for values in on_threads(3, own) for x in values)


def test_an_equation_of_a_subclass_gets_the_whole_batch_unless_it_states_otherwise() -> None:
    class Silent(SimCLR):
        pass

    class Changed(SimCLR):
        def loss(self, online, target, batch):  # type: ignore[no-untyped-def]
            return super().loss(online, target, batch)

    class Stated(Changed):
        own_rows = True

        def loss(self, online, target, batch):  # type: ignore[no-untyped-def]
            return super().loss(online, target, batch)

    assert [kind.own_rows for kind in (SimCLR, Silent, Changed, Stated)] == [True, True, False, True]
