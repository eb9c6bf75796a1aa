"""The grad-cache step around a user's own model and loss."""

import copy
from typing import Any

import pytest
import torch
from rank_pool import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import inbatch
from inbatch.distributed import gather_rows
from inbatch.errors import ConfigError
from inbatch.losses import barlow_twins, nt_xent

N = 12


class Model(nn.Module):
    """Convolution, batch norm and dropout; remembers the dropped rows of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(24, 8)
        self.dropped: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        x = self.dropout(self.trunk(images).flatten(1))
        self.dropped.append(x == 0)
        return self.head(x)


def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def views() -> tuple[Tensor, ...]:
    return torch.randn(2, N, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).unbind()


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def loss_of(rows: Tensor) -> Tensor:
    return nt_xent(gather_rows(rows), 0.2)


def literal(network: Model, chunks: int, seed: int) -> tuple[float, Tensor, Tensor]:
    """Return loss, gradient and running mean of one graph over all chunks."""
    torch.manual_seed(seed)
    keys = torch.randint(2**62, (chunks,)).tolist()
    norm, rows, means = network.trunk[1], [], []
    before = copy.deepcopy(norm.state_dict())
    for key, chunk in zip(keys, torch.stack(views()).chunk(chunks, dim=1), strict=True):
        for name, x in before.items():
            if name in norm._buffers:
                norm._buffers[name] = x.clone()
        torch.manual_seed(key)
        rows.append(network(chunk.flatten(0, 1)).unflatten(0, chunk.shape[:2]))
        means.append(norm.running_mean.clone())
    loss = nt_xent(torch.cat(rows, 1), 0.2)
    loss.backward()
    return loss.item(), gradient(network), torch.stack(means).mean(0)


@pytest.mark.parametrize("chunks", [1, 3, 4])
def test_gradients_are_those_of_one_graph(chunks: int) -> None:
    """To 1e-12, with batch norm and dropout, also added to earlier gradients; random numbers repeat."""
    value, expected, mean = literal(model(), chunks, seed=5)
    network = model()
    torch.manual_seed(5)
    with inbatch.grad_cache(network, chunks=chunks) as step:
        loss = step(views(), loss_of)
        assert not loss.requires_grad and loss.item() == pytest.approx(value, abs=1e-12)
        assert float((gradient(network) - expected).abs().max()) < 1e-12
        torch.testing.assert_close(network.trunk[1].running_mean, mean, rtol=0, atol=1e-12)
        assert network.trunk[1].num_batches_tracked == 1 and network.trunk[1].track_running_stats
        if chunks > 1:
            halves = network.dropped[:chunks], network.dropped[chunks:]
            assert all(torch.equal(*pair) for pair in zip(*halves, strict=True)) and len(network.dropped) == 2 * chunks
        network.load_state_dict(model().state_dict())
        torch.manual_seed(5)
        step(views(), loss_of)
    assert float((gradient(network) - 2 * expected).abs().max()) < 1e-12


def steps_on_ranks() -> tuple[float, list[float], list[float]]:
    torch.manual_seed(0)
    network = Model().double()
    network.dropout.p = 0.0
    wrapped = DistributedDataParallel(network)
    own = [view.chunk(2)[torch.distributed.get_rank()] for view in views()]
    with inbatch.grad_cache(wrapped, chunks=2) as step:
        for _ in range(2):  # the second step finds buffers to synchronise
            network.zero_grad()
            loss = step(own, loss_of)
    return loss.item(), gradient(network).tolist(), network.trunk[1].running_mean.tolist()


def test_ranks_of_two_chunks_are_one_process_of_four() -> None:
    """With DistributedDataParallel and gather_rows; running statistics are those of rank 0, as always there."""
    network = model()
    network.dropout.p = 0.0
    with inbatch.grad_cache(network, chunks=4) as step:
        loss = step(views(), loss_of)
    (first, gradients, mean), (second, same, other) = on_ranks(2, steps_on_ranks)
    assert first == second == pytest.approx(loss.item(), abs=1e-12)
    assert gradients == same == pytest.approx(gradient(network).tolist(), abs=1e-12)
    assert mean == other


def packed(run: Any) -> int:
    """Return the bytes that autograd holds at most between two backward passes."""
    held = [0, 0]

    def pack(x: Tensor) -> Tensor:
        held[0] += x.numel() * x.element_size()
        held[1] = max(held)
        return x

    def unpack(x: Tensor) -> Tensor:
        held[0] = 0
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        run()
    return held[1]


def test_the_memory_is_that_of_a_chunk() -> None:
    def kept(chunks: int) -> int:
        with inbatch.grad_cache(model(), chunks=chunks) as step:
            return packed(lambda: step(views(), loss_of))

    assert kept(6) < kept(1) / 4


def test_outputs_views_and_losses_of_other_kinds() -> None:
    """A single view, views of different size, dicts, tuples, and losses that return a dict."""
    network = model().eval()
    whole = views()
    small = whole[0][..., :5]
    with inbatch.grad_cache(network, chunks=3) as step:
        assert step(whole[0], lambda z: z.square().mean()).shape == ()
        terms = step(whole, barlow_twins)
        assert set(terms) > {"loss"} and not terms["loss"].requires_grad
        rows: list[Tensor] = []
        step([*whole, small], lambda z: rows.append(z) or z.square().mean())
        torch.testing.assert_close(rows[0][2], network(small))
        assert rows[0].shape == (3, N, 8)

    class Two(nn.Module):
        def __init__(self, layout: type) -> None:
            super().__init__()
            self.inner, self.layout = network, layout

        def forward(self, x: Tensor) -> Any:
            z = self.inner(x)
            return {"z": z, "h": z * 2} if self.layout is dict else (z, z * 2)

    for layout, pick in ((dict, lambda out: out["z"]), (tuple, lambda out: out[0])):
        network.zero_grad()
        with inbatch.grad_cache(Two(layout), chunks=2) as step:
            step(whole, lambda out, pick=pick: nt_xent(pick(out)))
        assert gradient(network).abs().sum() > 0


def test_autocast_and_a_scaler() -> None:
    """An outer autocast and a scaler give the gradient of plain autograd under the same autocast, scaled."""
    results = []
    for chunks in (1, 3):
        network = model().float().eval()
        with torch.autocast("cpu", torch.bfloat16), inbatch.grad_cache(network, chunks=chunks) as step:
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
            loss = step([x.float() for x in views()], loss_of, scaler=scaler)
        results.append(torch.cat([loss[None], gradient(network)]))
    network = model().float().eval()
    with torch.autocast("cpu", torch.bfloat16):
        rows = network(torch.cat(views()).float()).float().unflatten(0, (2, N))
        plain = loss_of(rows)
    plain.backward()
    for result in results:
        assert result[0].item() == pytest.approx(plain.item(), rel=1e-6)
        error = (result[1:] / 8 - gradient(network)).norm() / gradient(network).norm()
        assert float(error) < 0.02  # bfloat16 sums in other orders


def test_mistakes_are_explained() -> None:
    network, x = model(), views()
    cases: list[tuple[str, Any, Any]] = [
        ("12 samples cannot be cut into 13 chunks: choose at most 12", x, loss_of),
        (r"\[11, 12\] samples", [x[0], x[1][:11]], loss_of),
        ("scalar tensor", x, lambda z: z),
        ("carries no gradient", x, lambda z: z.detach().sum()),
        ("scalar 'loss', not NoneType", x, lambda z: {"value": z.sum()}),
        ("does not depend on the rows", x, lambda z: next(network.parameters()).sum()),
        ("sequence of tensors", [], loss_of),
    ]
    for message, images, loss in cases:
        with (
            inbatch.grad_cache(network, 13 if "13" in message else 2) as step,
            pytest.raises(ConfigError, match=message),
        ):
            step(images, loss)
    with inbatch.grad_cache(nn.Flatten(0), 2) as step, pytest.raises(ConfigError, match="one row per sample"):
        step(x, loss_of)
    with pytest.raises(ConfigError, match="chunks"), inbatch.grad_cache(network, 0):
        pass


class Detached(nn.Module):
    """A linear layer that also returns features without a gradient, and remembers the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.sizes = nn.Linear(3, 2), list[int]()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.sizes.append(len(x))
        rows = self.linear(x)
        return {"rows": rows, "features": rows.detach()}


@pytest.mark.parametrize(("chunks", "sizes"), [(1, [13]), (4, [4, 3, 3, 3]), (6, [3, 2, 2, 2, 2, 2])])
def test_number_of_chunks_is_kept_and_detached_outputs_are_allowed(chunks: int, sizes: list[int]) -> None:
    network, x = Detached(), torch.randn(13, 3, generator=torch.Generator().manual_seed(0))
    with inbatch.grad_cache(network, chunks) as step:
        step(x, lambda z: z["rows"].square().sum())
    assert network.sizes[: len(sizes)] == sizes
    grad = network.linear.weight.grad
    network.zero_grad()
    network(x)["rows"].square().sum().backward()
    torch.testing.assert_close(grad, network.linear.weight.grad)
