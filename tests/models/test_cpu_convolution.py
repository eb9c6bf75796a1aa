"""Convolutions whose weight gradient is one matrix product: the same gradient, used only for intended layers."""

import copy

import pytest
import torch
from torch import Tensor, nn

from inbatch.api import prepare
from inbatch.models import cpu_convolution
from inbatch.models.cpu_convolution import by_product

CASES = [  # channels in and out, side of the image, kernel, stride, padding
    (8, 16, 4, 3, 1, 1),
    (8, 16, 8, 3, 2, 1),
    (8, 16, 2, 1, 2, 0),
    (16, 8, 1, 3, 1, 1),
    (4, 8, 7, 5, 3, 0),
    (4, 8, (3, 6), (1, 3), (1, 2), (0, 1)),
]


def gradients(layer: nn.Module, x: Tensor, autocast: bool = False) -> tuple[Tensor, Tensor, Tensor, str]:
    """Return the output, the gradients of input and weights, and the name of the backward function."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    y.backward(weight)
    assert x.grad is not None and layer.weight.grad is not None
    return y.detach(), x.grad, layer.weight.grad, str(y.grad_fn)


@pytest.mark.grid(16)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("samples", [5, 300])
def test_gradients_are_those_of_torch(case: tuple, bias: bool, autocast: bool, samples: int) -> None:
    """The error against float64 is at most that of torch's convolution, which also rounds in bfloat16."""
    torch.manual_seed(0)
    fan_in, fan_out, side, kernel, stride, padding = case
    plain = nn.Conv2d(fan_in, fan_out, kernel, stride, padding, bias=bias).to(memory_format=torch.channels_last)
    x = torch.randn(samples, fan_in, *(side if isinstance(side, tuple) else (side, side)))
    if not autocast:
        plain, x = plain.bfloat16(), x.bfloat16()
    ours = copy.deepcopy(plain)
    by_product(ours)
    expected, actual = gradients(plain, x, autocast), gradients(ours, x, autocast)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()
        for p in exact.parameters():
            p.copy_(p.bfloat16())
    truth = gradients(exact, x.bfloat16().double())
    assert ("ByProduct" in actual[3]) == (not bias) and "ByProduct" not in expected[3]
    for mine, torchs, true in zip(actual[:3], expected[:3], truth[:3], strict=True):
        assert mine.dtype == torchs.dtype and mine.shape == torchs.shape
        size = true.norm()
        assert (mine.double() - true).norm() <= 1.5 * (torchs.double() - true).norm() + 2e-3 * size
    if bias:
        torch.testing.assert_close(ours.bias.grad, plain.bias.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "options, side, kind",
    [
        ({}, 5, torch.bfloat16),  # 25 output pixels
        ({}, 4, torch.float32),
        ({"groups": 2}, 4, torch.bfloat16),
        ({"dilation": 2, "padding": 2}, 4, torch.bfloat16),
        ({"padding_mode": "reflect"}, 4, torch.bfloat16),
        ({"padding": "same"}, 4, torch.bfloat16),
    ],
)
def test_all_others_are_left_to_torch(options: dict, side: int, kind: torch.dtype) -> None:
    layer = nn.Conv2d(8, 8, 3, **({"padding": 1} | options)).to(kind)
    by_product(layer)
    x = torch.randn(2, 8, side, side).to(kind)
    assert "ByProduct" not in str(layer(x).grad_fn)
    with torch.no_grad():
        assert layer(x[:, :, :4, :4]).grad_fn is None


def test_a_layer_of_ones_own_is_not_touched() -> None:
    class Own(nn.Conv2d):
        pass

    network = nn.Sequential(Own(3, 3, 1), nn.Conv2d(3, 3, 1))
    names = list(network.state_dict())
    by_product(network)
    assert (
        type(network[0]) is Own and type(network[1]) is cpu_convolution.Conv2d and list(network.state_dict()) == names
    )


@pytest.mark.grid(2)
@pytest.mark.parametrize("precision", ["bf16", "float32"])
@pytest.mark.parametrize("slow", [True, False])
def test_run_uses_it_for_slow_weight_gradients_only(
    precision: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inbatch.training.build.slow_weight_gradients", lambda: slow)
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    built = prepare(images, encoder="tiny", batch_size=8, settings={"precision": precision}, device="cpu")
    kinds = {type(m) for m in built.encoder.modules() if isinstance(m, nn.Conv2d)}
    assert (cpu_convolution.Conv2d in kinds) == (precision == "bf16" and slow)
    losses = built.step(next(iter(built.loader.epoch(0))), 0)
    assert torch.isfinite(losses["loss"])
