"""Batch fusion: the paper's module against a literal one, the order-invariant one, and their use in the network."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inbatch.context.fusion import FUSIONS, ConvFusion, Fusion, SetFusion, attention, patch_for, patches, restore
from inbatch.context.grouped import as_group
from inbatch.errors import ConfigError
from inbatch.models.network import Network, ema_update, make_target_network
from inbatch.nn.heads import Head

GIVEN = {"group": 6, "size": 8, "mean": (0.25, 0.5, 0.75), "std": (0.5, 0.25, 2.0)}
KINDS = pytest.mark.parametrize("kind", FUSIONS)


def make(kind: str, **options: object) -> Fusion:
    torch.manual_seed(0)
    return FUSIONS[kind](**(GIVEN | options)).double()


def random_images(n: int = 6, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_patch_is_a_row_as_in_equation_2() -> None:
    images = random_images(2, 224)
    tokens = patches(images, 16)
    assert tokens.shape == (2, 196, 768)
    torch.testing.assert_close(tokens[1, 15].view(16, 16, 3), images[1, :, 16:32, 16:32].permute(1, 2, 0))
    assert torch.equal(restore(tokens, 16, images.shape), images)


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (2, 3, 8, 12), (1, 4, 6, 6)])
def test_restoring_undoes_partition(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape)
    assert torch.equal(restore(patches(images, 2), 2, shape), images)


def literal(fusion: ConvFusion, images: Tensor) -> Tensor:
    """Compute Eq. 2 to 5, sample by sample and position by position."""
    g, c, h, w = images.shape
    p = fusion.patch
    rows = [
        [
            [images[i, ch, y + dy, x + dx] for dy in range(p) for dx in range(p) for ch in range(c)]
            for y in range(0, h, p)
            for x in range(0, w, p)
        ]
        for i in range(g)
    ]
    plane = torch.tensor(rows, dtype=torch.float64)  # (G, P, d)
    for layer in fusion.layers:
        kernels = [m.weight for m in layer.steps if isinstance(m, nn.Conv2d)]
        x = plane
        for number, kernel in enumerate(kernels):
            into = F.pad(x, (1, 1, 1, 1)) if kernel.shape[-1] == 3 else x
            out = torch.zeros(kernel.shape[0], *x.shape[1:], dtype=torch.float64)
            for o in range(kernel.shape[0]):
                for i in range(kernel.shape[1]):
                    for a in range(kernel.shape[2]):
                        for b in range(kernel.shape[3]):
                            out[o] += kernel[o, i, a, b] * into[i, a : a + x.shape[1], b : b + x.shape[2]]
            x = torch.stack([(one - one.mean()) / (one.var(correction=0) + 1e-5).sqrt() for one in out])
            if number < len(kernels) - 1:
                x = x * torch.tanh(torch.log1p(torch.exp(x)))  # Mish
        plane = x + plane
    back = torch.empty_like(images)
    for i in range(g):
        for n, row in enumerate(plane[i]):
            y, x = n // (w // p) * p, n % (w // p) * p
            back[i, :, y : y + p, x : x + p] = row.view(p, p, c).permute(2, 0, 1)
    return (back + images).relu() if fusion.relu else back + images


@pytest.mark.parametrize("options", [{}, {"relu": True}, {"layers": 2, "bottleneck": 2}, {"patch": 2, "bottleneck": 1}])
def test_conv_is_the_papers_module(options: dict) -> None:
    fusion = make("conv", **{"bottleneck": 3} | options)
    torch.testing.assert_close(fusion(random_images()), literal(fusion, random_images()), rtol=0, atol=1e-10)


@KINDS
@pytest.mark.parametrize("relu", [True, False])
def test_before_normalisation_means_on_the_images_own_values(kind: str, relu: bool) -> None:
    before, after = (make(kind, where=where, relu=relu, bottleneck=2) if kind == "conv" else
                     make(kind, where=where, relu=relu) for where in ("before", "after"))  # fmt: skip
    mean, std = (torch.tensor(GIVEN[k], dtype=torch.float64).view(3, 1, 1) for k in ("mean", "std"))
    expected = (after(random_images() * std + mean) - mean) / std
    torch.testing.assert_close(before(random_images()), expected)


def test_fusion_of_a_set_does_not_depend_on_order_or_size() -> None:
    fusion, images = make("set"), random_images(6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(fusion(images[order]), fusion(images)[order])
    assert fusion(random_images(9)).shape == (9, 3, 8, 8)
    moved = images.clone()
    moved[5] += 1
    assert not torch.equal(fusion(moved)[:5], fusion(images)[:5]), "no sample saw another"


def test_conv_depends_on_the_order_and_set_does_not() -> None:
    fusion, images = make("conv", bottleneck=2), random_images(6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert not torch.allclose(fusion(images[order]), fusion(images)[order])


@KINDS
def test_evaluation_mode_is_the_identity_without_a_declared_group(kind: str) -> None:
    fusion, images = make(kind, **({"bottleneck": 2} if kind == "conv" else {})), random_images()
    trained = fusion(images)
    fusion.eval()
    assert fusion(images) is images
    with as_group(fusion):
        assert torch.equal(fusion(images), trained)
    assert fusion(images[:1]) is not None and torch.equal(fusion(images[:1]), images[:1])


@KINDS
def test_no_layers_are_the_bare_method(kind: str) -> None:
    fusion = make(kind, layers=0)
    assert torch.equal(fusion(random_images()), random_images()) and not list(fusion.parameters())


@KINDS
def test_gradients_reach_every_parameter_and_the_images(kind: str) -> None:
    fusion = make(kind, layers=2, **({"bottleneck": 2} if kind == "conv" else {}))
    images = random_images().requires_grad_()
    fusion(images).pow(3).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (*fusion.parameters(), images))


@KINDS
def test_a_group_in_two_parts_is_the_group(kind: str) -> None:
    """One process simulates two: each gets the other's part, with gradient."""
    options = {"bottleneck": 2} if kind == "conv" else {}
    whole, parts = make(kind, **options), make(kind, **options)
    weight = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    (whole(random_images()) * weight).sum().backward()
    halves = random_images().chunk(2)
    for rank in range(2):
        parts.gather = lambda x: torch.cat(halves)
        parts.own = lambda x, rank=rank: x.chunk(2)[rank]
        (parts(halves[rank]) * weight.chunk(2)[rank]).sum().backward()
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@KINDS
def test_bfloat16_is_close_and_keeps_its_type(kind: str) -> None:
    fusion = make(kind, **({"bottleneck": 2} if kind == "conv" else {})).float()
    exact = fusion(random_images().float())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = fusion(random_images().float())
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().mean() < 0.03


@pytest.mark.parametrize(("size", "patch"), [(224, 16), (96, 8), (64, 8), (32, 4), (20, 4), (28, 4), (30, 3), (7, 1)])
def test_patches_that_divide_the_side(size: int, patch: int) -> None:
    assert patch_for(size, None) == patch


@pytest.mark.parametrize("wrong", [
    lambda: patch_for(32, 5), lambda: patch_for(32, 0), lambda: make("conv", layers=4), lambda: make("conv", layers=-1),
    lambda: make("conv", bottleneck=7), lambda: make("conv", bottleneck=0), lambda: make("set", heads=3),
    lambda: make("set", heads=0),
])  # fmt: skip
def test_invalid_options_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        wrong()


def network(kind: str = "set", **options: object) -> Network:
    torch.manual_seed(2)
    encoder = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(180, 7))
    heads = {"projection": Head(nn.Linear(7, 4))}
    fuse = FUSIONS[kind](**(GIVEN | options))
    return Network(encoder, heads, ("projection",), fuse=fuse, fused=(1,))


def test_network_fuses_the_views_with_the_given_numbers() -> None:
    one, plain = network(), network()
    plain.fuse = None
    a, b = random_images(6).float(), random_images(6).float().flip(0)
    both = one([a, b])["projection"]
    torch.testing.assert_close(both[0], plain([a])["projection"][0])
    torch.testing.assert_close(both[1], plain([one.fuse(b)])["projection"][0])
    torch.testing.assert_close(one([b], [1])["projection"][0], both[1])
    torch.testing.assert_close(one([b], [0])["projection"][0], plain([b])["projection"][0])


@pytest.mark.parametrize("joined", [False, True])
def test_norm_statistics_come_from_plain_views_if_there_are_any(joined: bool) -> None:
    a, b = random_images(6).float(), random_images(6).float().flip(0)

    def left(views: list[Tensor], numbers: list[int], **options: object) -> Tensor:
        net = network(**options)
        net.joined = joined
        net(views, numbers)
        return net.encoder[1].running_mean

    torch.testing.assert_close(left([a, b], [0, 1]), left([a], [0]))
    assert not torch.equal(left([a, b], [0, 1], remember="all"), left([a], [0]))
    assert not torch.equal(left([b], [1]), torch.zeros(5)), "a single view updates the running statistics"


@pytest.mark.parametrize("target", ["copy", "shared", "none"])
def test_target_network_fuses_as_its_option_states(target: str) -> None:
    one = network(target=target)
    slow = make_target_network(one, {"projection": Head(one.heads["projection"])}, ("projection",))
    before = copy.deepcopy(slow)
    with torch.no_grad():
        for p in one.parameters():
            p += 1
    ema_update(slow, one, 0.9)
    if target == "none":
        assert slow.fuse is None
        return
    assert isinstance(slow.fuse, SetFusion) and not any(p.requires_grad for p in slow.parameters())
    gone = 1.0 if target == "shared" else 0.1
    for now, was in zip(slow.fuse.parameters(), before.fuse.parameters(), strict=True):
        torch.testing.assert_close(now, was + gone)
    torch.testing.assert_close(slow.encoder[3].weight, before.encoder[3].weight + 0.1)


@KINDS
def test_the_memory_layout_does_not_change_gradients(kind: str) -> None:
    """The gradients of a norm of torch were wrong in channels-last, the default layout of runs."""
    images, weight = random_images(), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        fusion = make(kind).to(memory_format=layout)
        (fusion(images) * weight).sum().backward()
        gradients.append([p.grad for p in fusion.parameters()])
    for plain, last in zip(*gradients, strict=True):
        torch.testing.assert_close(last, plain, rtol=1e-9, atol=1e-9)


def test_attention_is_that_of_mkl_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on AMD processors set oneDNN, which is four times slower for its small products; the setting is restored."""
    matmul, asked = torch.backends.mkldnn.matmul, []
    usual = torch.nn.functional.scaled_dot_product_attention

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        asked.append(matmul.fp32_precision)
        output = usual(*inputs)
        output.register_hook(lambda gradient: asked.append(matmul.fp32_precision))
        return output

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    inputs, weight = torch.randn(3, 5, 2, 9, 4), torch.randn(5, 2, 9, 4)

    def both_passes() -> list[torch.Tensor]:
        own = inputs.clone().requires_grad_()
        output = attention(*own)
        return [output.detach(), *torch.autograd.grad((output * weight).sum(), own)]

    before, plain = matmul.fp32_precision, both_passes()
    matmul.fp32_precision = "bf16"
    try:
        inside = both_passes()
        assert asked == [before, before, "ieee", "ieee"] and matmul.fp32_precision == "bf16"
        wide = attention(*inputs.double().requires_grad_())
        assert wide.dtype == torch.float64 and asked[-1] == "bf16"
    finally:
        matmul.fp32_precision = before
    assert all(torch.equal(x, y) for x, y in zip(plain, inside, strict=True))
