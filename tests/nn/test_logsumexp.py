"""Tiled losses: values and gradients equal the literal versions, and memory stays within the documented bound."""

from collections.abc import Callable, Iterator

import pytest
import torch
from rank_pool import on_ranks
from small_methods import VARIANTS, literal, train
from step_states import N, assert_same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from inbatch import api, losses
from inbatch.methods.cc import contrast
from inbatch.methods.pcl import proto_nce
from inbatch.nn import cpu_matmul, exponentials, logsumexp, row_blocks, tiles
from inbatch.nn.functional import logsumexp_excluding_self, normalize


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, also partial ones, in small matrices."""
    monkeypatch.setattr(tiles, "TILE", 7)
    monkeypatch.setattr(tiles, "APART", 0)
    monkeypatch.setattr(logsumexp, "_BLOCK", 100)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, unit: bool = True) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (normalize(x) if unit else x).to(dtype)


def both(compute: Callable[..., Tensor], *tensors: Tensor, weighted: bool = True) -> Iterator[list[Tensor]]:
    """Return value and gradients of a function of tensors, literal and tiled."""
    for mode in ("never", "always"):
        leaves = [x.clone().requires_grad_(x.requires_grad or x.is_floating_point()) for x in tensors]
        with logsumexp.using(mode=mode):
            value = compute(*leaves)
            weight = rows(*value.shape, seed=9, dtype=value.dtype, unit=False) if weighted and value.ndim else 1.0
            (value * weight).sum().backward()
        yield [value.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves if x.is_leaf)]


def same(compute: Callable[..., Tensor], *tensors: Tensor, tolerance: float = 1e-12) -> None:
    expected, actual = both(compute, *tensors)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


FLOAT32 = 2e-5
"""A few roundings of float32, magnified by 1 / T if logits are exponentiated."""


@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.02, 0.003])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, FLOAT32)])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (20, 33), (33, 5)])
def test_rows_and_keys(n: int, m: int, dtype: torch.dtype, tolerance: float, temperature: float) -> None:
    q, k = rows(n, 6, dtype=dtype), rows(m, 6, seed=1, dtype=dtype)
    same(lambda q, k: logsumexp.logsumexp(q, k, temperature), q, k, tolerance=tolerance)
    same(lambda q: logsumexp.logsumexp(q, k, temperature), q, tolerance=tolerance)  # keys get no gradient
    same(lambda k: logsumexp.logsumexp(q, k, temperature), k, tolerance=tolerance)  # queries get no gradient


@pytest.mark.parametrize("temperature", [0.5, 0.03, 0.01])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, FLOAT32)])
@pytest.mark.parametrize("n", [2, 7, 8, 40])
def test_logsumexp_of_rows_with_themselves(n: int, dtype: torch.dtype, tolerance: float, temperature: float) -> None:
    u, more = rows(n, 6, dtype=dtype), rows(n + 9, 6, seed=1, dtype=dtype)
    same(lambda u: logsumexp.logsumexp(u, u, temperature, exclude_self=True), u, tolerance=tolerance)
    same(lambda u: logsumexp.logsumexp(u, u, temperature), u, tolerance=tolerance)
    same(lambda u, k: logsumexp.logsumexp(u, k, temperature, exclude_self=True), u, more, tolerance=tolerance)


def test_no_queries_and_no_keys() -> None:
    """A sum over no keys is 0, also in tiles."""
    for n, m in ((0, 5), (4, 0), (0, 0)):
        q, k = torch.ones(n, 3, requires_grad=True), torch.ones(m, 3, requires_grad=True)
        with logsumexp.using(mode="always"):
            actual = logsumexp.logsumexp(q, k, 0.5)
        assert torch.equal(actual, torch.full((n,), -torch.inf))
        assert not any(x.any() for x in torch.autograd.grad(actual.sum(), (q, k)))


def test_rows_of_any_length_and_a_row_without_gradient() -> None:
    q, k = 40 * rows(12, 5, unit=False), rows(30, 5, seed=1, unit=False)
    same(lambda q, k: logsumexp.logsumexp(q, k, 0.1), q, k)
    same(lambda q, k: logsumexp.logsumexp(q, k, 0.1)[:3] * 0, q, k)
    same(lambda q: logsumexp.logsumexp(q, q, 1.0, exclude_self=True), q / 40)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "nt_xent": lambda z: losses.nt_xent(z, 0.1),
    "supcon": lambda z: losses.supcon(z, torch.arange(z.shape[1]) % 4 - 1, 0.1),
    "supcon, one": lambda z: losses.supcon(z, None, 0.1, contrast_mode="one"),
    "supcon, mask": lambda z: losses.supcon(z, mask=(rows(z.shape[1], z.shape[1]) > 0.1).to(z)),
    "info_nce": lambda z: losses.info_nce(z[0], z[1], rows(50, z.shape[2], seed=3).to(z), 0.07),
    "info_nce, smooth": lambda z: losses.info_nce(z[0], z[1], rows(50, z.shape[2], seed=3).to(z), 0.07, 0.3, 5),
    "dcl": lambda z: losses.dcl(z, 0.1),
    "dclw": lambda z: losses.dcl(z, 0.1, sigma=0.5),
    "hcl": lambda z: losses.hcl(z, 0.2),
    "nnclr": lambda z: losses.nnclr(z[0], z[1], 0.1),
    "nnclr, nt_xent": lambda z: losses.nnclr(z[0], z[1], 0.1, "nt_xent"),
    "ctr": lambda z: losses.ctr(z[0], z[1], 0.2),
    "cc": lambda z: contrast(z, 0.5),
    "proto_nce": lambda z: proto_nce(z[0], rows(600, z.shape[2]).to(z), torch.linspace(0.1, 0.3, 600).to(z)),
    "sogclr": lambda z: sogclr(z),
}


def sogclr(z: Tensor) -> Tensor:
    """Compute a sum like SogCLR's (Yuan et al. 2022): exponentials over a moving average of every sample."""
    u = normalize(z).flatten(0, 1)
    past = torch.linspace(1, 2, len(u)).to(u)
    return (logsumexp_excluding_self(u, 0.1) - past.log()).exp().mean()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, FLOAT32)])
def test_every_loss(name: str, dtype: torch.dtype, tolerance: float) -> None:
    same(LOSSES[name], rows(2, 19, 8, dtype=dtype, unit=False), tolerance=tolerance)


@pytest.mark.parametrize("anchors", ["all", "one"])
def test_supcon_by_classes_is_supcon_by_pairs(anchors: str) -> None:
    """Labels are summed by class; a mask of the same pairs uses the general implementation."""
    z, label = rows(3, 11, 5, unit=False).requires_grad_(), torch.arange(11) % 4 - 1
    pairs = ((label[:, None] == label) & (label >= 0)) | torch.eye(11, dtype=torch.bool)
    actual = torch.autograd.grad(losses.supcon(z, label, 0.1, contrast_mode=anchors), z)[0]
    expected = torch.autograd.grad(losses.supcon(z, mask=pairs, temperature=0.1, contrast_mode=anchors), z)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.grid(1)
@pytest.mark.parametrize("name", [name for name in LOSSES if "mask" not in name])
def test_no_matrix_of_pairs_is_allocated(name: str, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(tiles, "TILE", 32)
    monkeypatch.setattr(logsumexp, "_BLOCK", 2**12)
    z = rows(2, 600, 8, dtype=torch.float32).requires_grad_()
    compute = LOSSES[name]
    with logsumexp.using(mode="always"), Largest() as largest:
        compute(z).backward()
    assert largest.numbers < 3 * z.numel(), "O(N D)"
    with logsumexp.using(mode="never"), Largest() as largest:
        compute(z).backward()
    literal = 600 * (50 if name.startswith("info_nce") else 600)
    assert largest.numbers >= literal, "the test can see a matrix"


def test_kept_tiles_change_no_bit_and_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tile, some or all are kept for the backward pass: of one or two sets of rows, plain and weighted."""
    monkeypatch.setattr(tiles, "TILE", 7)
    results: dict[int, list[torch.Tensor]] = {}
    for most in (0, 500, 10**6):
        monkeypatch.setattr(exponentials, "KEPT", most)
        results[most], u, k = [], rows(40, 4).requires_grad_(), rows(30, 4, seed=1).requires_grad_()
        same = torch.arange(40) // 2
        for keys, options in ((u, {"exclude_self": True}), (k, {}), (u, {"weights": logsumexp.SameGroup(same, same)})):
            with logsumexp.using(mode="always"):
                value = logsumexp.logsumexp(u, keys, 0.1, **options)
            kept = value.grad_fn.kept  # type: ignore[union-attr]
            pairs = sum(x.numel() for x in kept.values())
            assert pairs <= most and (len(kept) > 2 or not most)
            results[most] += [value.detach(), *torch.autograd.grad(value.sum(), [u] if keys is u else [u, keys])]
            assert not kept
        with torch.no_grad(), logsumexp.using(mode="always"):
            logsumexp.logsumexp(u, u, 0.1)
    for most in (500, 10**6):
        assert all(torch.equal(x, y) for x, y in zip(results[0], results[most], strict=True))


def test_tiled_mode_is_chosen_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(logsumexp._Tiled, "apply", lambda *args: calls.append(args) or torch.zeros(()))
    monkeypatch.setattr(logsumexp, "LEAST", 400)
    for n in (19, 20):
        logsumexp.logsumexp(rows(n, 4), rows(20, 4), 0.1)
    assert len(calls) == 1
    with logsumexp.using(mode="never"):
        logsumexp.logsumexp(rows(40, 4), rows(20, 4), 0.1)
        with logsumexp.using(mode="always"):
            logsumexp.logsumexp(rows(2, 4), rows(2, 4), 0.1)
    assert len(calls) == 2


def test_backward_pass_can_be_repeated() -> None:
    u, q, k = (rows(20, 4, seed=s).requires_grad_() for s in range(3))
    with logsumexp.using(mode="always"):
        for value, leaf in ((logsumexp.logsumexp(u, u, 0.1, True), u), (logsumexp.logsumexp(q, k.detach(), 0.1), q)):
            first, second = (torch.autograd.grad(value.sum(), leaf, retain_graph=True)[0] for _ in range(2))
            assert torch.equal(first, second)


def test_autocast_does_not_round_the_products() -> None:
    u = rows(30, 8, dtype=torch.float32).requires_grad_()
    with logsumexp.using(mode="always"):
        plain = torch.autograd.grad(logsumexp.logsumexp(u, u, 0.1, True).sum(), u)[0]
        with torch.autocast("cpu", torch.bfloat16):
            inside = torch.autograd.grad(logsumexp.logsumexp(u, u, 0.1, True).sum(), u)[0]
    assert torch.equal(plain, inside)


def test_bf16_products_are_rounded_only_on_request() -> None:
    u = rows(200, 16, dtype=torch.float32).requires_grad_()
    value, exact = {}, {}
    for kind in ("float32", "bf16"):
        with logsumexp.using(mode="always", products=kind):
            lse = logsumexp.logsumexp(u, u, 0.1, True)
            value[kind], exact[kind] = lse, torch.autograd.grad(lse.mean(), u)[0]
    error = (exact["bf16"] - exact["float32"]).norm() / exact["float32"].norm()
    assert 1e-5 < error < 5e-3
    torch.testing.assert_close(value["bf16"], value["float32"], rtol=1e-3, atol=1e-3)


def test_setting_of_torch_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after an error inside, and with two overlapping losses of which the first ends first."""
    monkeypatch.setattr(cpu_matmul, "onednn", lambda: True)
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
    try:
        with pytest.raises(ZeroDivisionError), cpu_matmul.fast_products():
            assert matmul.fp32_precision == "bf16"
            raise ZeroDivisionError
        assert matmul.fp32_precision == "ieee"
        one, other = cpu_matmul.fast_products(), cpu_matmul.fast_products()
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        assert matmul.fp32_precision == "bf16"
        other.__exit__(None, None, None)
        assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = before


def test_nearest() -> None:
    q, k = rows(300, 6, dtype=torch.float32), rows(70, 6, seed=1, dtype=torch.float32)
    assert torch.equal(logsumexp.nearest(q, k)[:, 0], (q @ k.T).argmax(1))
    assert torch.equal(logsumexp.nearest(q, k, count=3), (q @ k.T).topk(3).indices)
    out = torch.arange(70) >= 20
    assert torch.equal(logsumexp.nearest(q, k, out)[:, 0], (q @ k[:20].T).argmax(1))


def train_one(variant: str, groups: int) -> dict:
    logsumexp.LEAST, row_blocks.LEAST, tiles.TILE, tiles.APART = 0, 0, 5, 0
    return train(variant, N, groups)


@pytest.mark.grid(1)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("world", "groups"), [(2, 1), (4, 1), (2, 2)])
def test_tiles_dealt_to_ranks_equal_plain_autograd(variant: str, world: int, groups: int) -> None:
    with logsumexp.using(mode="never"):
        expected = literal(variant, N, world * groups)
    for result in on_ranks(world, train_one, variant, groups):
        assert_same(result, expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_each_rank_and_core_makes_its_share_of_the_tiles(threads: int, one_thread: None) -> None:
    torch.set_num_threads(threads)
    u, counts = rows(112, 4), []
    for rank in range(3):
        cut = [tiles.Tiles(u, k, 1.0, tiles.LogSumExpConfig(rank=rank, world=3)) for k in (None, u)]
        assert [own.parts for own in cut] == [threads, threads]
        counts += [[sum(1 for _ in own(part)) for own in cut] for part in range(threads)]
    # 16 strips: of a symmetric matrix a square tile, and one for every two of the other squares.
    assert [sum(c) for c in zip(*counts, strict=True)] == [sum(1 + -(-(15 - i) // 2) for i in range(16)), 16 * 8]
    assert all(max(c) - min(c) <= 1 for c in zip(*counts, strict=True))


def test_tiles_do_not_depend_on_the_threads_of_a_rank(one_thread: None) -> None:
    """Every pair is in one tile, or in one on or above the diagonal, for any number of cores of a rank."""
    u = rows(108, 4)
    for k, expected in ((None, torch.ones(108, 108).triu()), (rows(95, 4), torch.ones(108, 95))):
        times = torch.zeros_like(expected)
        for rank, threads in enumerate((1, 3, 8)):
            torch.set_num_threads(threads)
            own = tiles.Tiles(u, k, 1.0, tiles.LogSumExpConfig(rank=rank, world=3))
            for part in range(own.parts):
                for r, c, e in own(part):
                    assert e.shape == times[r, c].shape
                    times[r, c] += 1
        if k is None:
            squares = times.tril(-1)
            assert squares.sum() < 108 * 7 / 2, "only the squares on the diagonal are computed twice"
            times = times.triu()
        assert torch.equal(times, expected)


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_cores_side_by_side_find_the_same_and_bit_for_bit_again(threads: int, one_thread: None) -> None:
    u, k = rows(90, 6).requires_grad_(), rows(70, 6, seed=1).requires_grad_()

    def value_and_gradients() -> list[Tensor]:
        with logsumexp.using(mode="always"):
            pair = logsumexp.logsumexp(u, u, 0.1, True), logsumexp.logsumexp(u, k, 0.1)
            return [*pair, *torch.autograd.grad((pair[0] * pair[0]).sum() + pair[1].sum(), (u, k))]

    expected = value_and_gradients()
    torch.set_num_threads(threads)
    once, again = value_and_gradients(), value_and_gradients()
    assert torch.get_num_threads() == threads
    for a, b, c in zip(expected, once, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert torch.equal(b, c)


def test_run_uses_the_loss_precision_of_its_recipe() -> None:
    options = {"subset": 80, "batch_size": 16, "precision": "float32", "settings": {"loss_precision": "bf16"}}
    built, plans = api.prepare("digits-canvas", "simclr", **options, device="cpu"), []
    compute = built.method.loss
    built.method.loss = lambda *rows: plans.append(tiles.PLAN.get()) or compute(*rows)
    built.step(next(iter(built.loader.epoch(0))), 0)
    assert plans[0].products == "bf16" and tiles.PLAN.get() == logsumexp.LogSumExpConfig()
