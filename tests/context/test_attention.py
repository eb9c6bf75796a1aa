"""Attention over samples: its values, its absence in evaluation, and its position in the encoder."""

import copy
import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from inbatch.context.attention import BA2M, BatchFormer
from inbatch.context.grouped import as_group
from inbatch.errors import ConfigError
from inbatch.models import ATTENDS, added, create_encoder, load_encoder, save_encoder, without
from inbatch.models.attention_slots import blocks, mixes_in_training_only
from inbatch.training.summary import attention

EVERY = pytest.mark.parametrize("name", ATTENDS)
WEIGHTS = pytest.mark.parametrize("weight", ["sample", "channel", "full"])
FUSES = pytest.mark.parametrize("fuse", ["sum", "max"])
MET = sorted(name for name in ATTENDS if mixes_in_training_only(name))


def stirred(module: nn.Module, seed: int = 1) -> nn.Module:
    """Move every parameter and running statistic off its initial value, and sample weights far from 1."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.3
            p += scale * torch.randn(p.shape, generator=draw, dtype=p.dtype)
        for block in (m for m in module.modules() if isinstance(m, BA2M)):
            block.gain.fill_(20)
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean += torch.randn(norm.running_mean.shape, generator=draw)
            norm.running_var *= 0.5 + torch.rand(norm.running_var.shape, generator=draw)
    return module


def blocks_of(group: int = 5) -> list[tuple[nn.Module, Tensor]]:
    """Return blocks with attention over samples, off their initial values, each with a group of inputs."""
    kinds = [(fuse, weight) for fuse in ("sum", "max") for weight in ("sample", "channel", "full")]
    maps = [stirred(BA2M(12, fuse=fuse, weight=weight, positions=3).double()) for fuse, weight in kinds]
    pairs = [(block, torch.randn(group, 12, 5, 4, dtype=torch.float64)) for block in maps]
    return [*pairs, (stirred(BatchFormer(12, heads=3, keep=0.0).double()), torch.randn(group, 12, dtype=torch.float64))]


def dot(a: Tensor, b: Tensor) -> float:
    return sum(x * y for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(v) for v in values]
    return [p / sum(powers) for p in powers]


def literal_representation(block: BA2M, x: Tensor) -> Tensor:
    """Compute the three branches of one sample (C, H, W), value by value."""
    channels, height, width = x.shape
    first, last = block.channel[0], block.channel[2]
    inner = len(first.weight)
    mean = [sum(x[c].flatten().tolist()) / (height * width) for c in range(channels)]
    hidden = [max(0.0, dot(first.weight[r], torch.tensor(mean)) + float(first.bias[r])) for r in range(inner)]
    by_channel = [dot(last.weight[c], torch.tensor(hidden)) for c in range(channels)]

    reduce, three, _, expand = block.local
    small = torch.tensor([[[dot(reduce.weight[r], x[:, i, j]) for j in range(width)] for i in range(height)]
                          for r in range(inner)])  # fmt: skip
    near = torch.zeros(inner, height, width)
    for r in range(inner):
        for i in range(height):
            for j in range(width):
                total = float(three.bias[r])
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        if 0 <= i + di < height and 0 <= j + dj < width:
                            total += dot(three.weight[r, :, di + 1, dj + 1], small[:, i + di, j + dj])
                near[r, i, j] = max(0.0, total)

    side = math.ceil(max(height, width) / block.positions)
    rows, columns = math.ceil(height / side), math.ceil(width / side)
    places = []
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * side : (i + 1) * side, j * side : (j + 1) * side]
            places.append(torch.tensor([sum(c.flatten().tolist()) / c.numel() for c in window]))
    q, k, v = (
        [torch.tensor([dot(block.qkv.weight[part * inner + r], place) for r in range(inner)]) for place in places]
        for part in range(3)
    )
    far = []
    for a in range(len(places)):
        share = softmax([dot(q[a], k[b]) / math.sqrt(inner) for b in range(len(places))])
        far.append(sum(share[b] * v[b] for b in range(len(places))))

    output = torch.zeros(channels, height, width)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                three_of_them = (
                    by_channel[c],
                    dot(expand.weight[c], near[:, i, j]),
                    dot(block.expand.weight[c], far[(i // side) * columns + j // side]),
                )
                output[c, i, j] = sum(three_of_them) if block.fuse == "sum" else max(three_of_them)
    return output


def literal(block: BA2M, x: Tensor) -> Tensor:
    sars = [literal_representation(block, sample) for sample in x]
    if block.weight == "sample":
        sars = [torch.full_like(sar, sum(sar.flatten().tolist()) / sar.numel()) for sar in sars]
    elif block.weight == "channel":
        sars = [torch.stack([torch.full_like(c, sum(c.flatten().tolist()) / c.numel()) for c in sar]) for sar in sars]
    y = x.clone()
    for c, i, j in np.ndindex(*x.shape[1:]):
        share = softmax([block.gain.item() * float(sar[c, i, j]) for sar in sars])
        for n in range(len(x)):
            y[n, c, i, j] = x[n, c, i, j] * len(x) * share[n]
    return y


@pytest.mark.grid(6)
@WEIGHTS
@FUSES
@pytest.mark.parametrize("positions", [2, 9])
def test_ba2m_is_the_literal_one(fuse: str, weight: str, positions: int) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        block = stirred(BA2M(4, fuse=fuse, weight=weight, positions=positions))
        x = torch.randn(3, 4, 5, 3)
        with torch.no_grad():
            output = block(x)
            assert not torch.allclose(output, x, rtol=0.1)
            assert torch.allclose(output, literal(block, x), rtol=1e-9, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)


def test_batchformer_is_the_literal_one() -> None:
    block, x = blocks_of()[-1]
    with torch.no_grad():
        n, heads, d = block.norm(x), block.heads, 12 // block.heads
        q, k, v = (n @ part.T for part in block.qkv.weight.chunk(3))
        met = torch.zeros_like(x)
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            for i in range(len(x)):
                share = softmax([dot(q[i, own], k[j, own]) / math.sqrt(d) for j in range(len(x))])
                met[i, own] = sum(share[j] * v[j, own] for j in range(len(x)))
                assert torch.allclose(block.weights(x)[i, h], torch.tensor(share, dtype=x.dtype))
        expected = x + block.out(met)
        expected = expected + block.mlp(expected)
        assert torch.allclose(block(x), expected, rtol=1e-10)


@WEIGHTS
@FUSES
@pytest.mark.parametrize("group", [1, 2, 7])
def test_the_mean_weight_is_one(fuse: str, weight: str, group: int) -> None:
    block = stirred(BA2M(16, fuse=fuse, weight=weight))
    x = torch.randn(group, 16, 6, 6)
    weights = block.weights(x)
    shapes = {"sample": (group, 1, 1, 1), "channel": (group, 16, 1, 1), "full": (group, 16, 6, 6)}
    assert weights.shape == shapes[weight] and weights.dtype == torch.float32
    assert torch.allclose(weights.mean(0), torch.ones(()), atol=1e-6)
    assert group == 1 or weights.std(0).min() > 1e-3
    assert torch.equal(block(x), x * weights)


def test_training_starts_where_the_plain_backbone_does() -> None:
    x = torch.randn(4, 24, 6, 6)
    assert torch.allclose(BA2M(24)(x), x, rtol=1e-6)
    features = torch.randn(4, 24)
    assert torch.equal(BatchFormer(24)(features), features)


def test_the_order_of_samples_does_not_matter() -> None:
    for block, x in blocks_of():
        order = torch.randperm(len(x))
        assert torch.allclose(block(x[order]), block(x)[order], rtol=1e-10)


def test_samples_interact_in_training_and_in_a_declared_group() -> None:
    for block, x in blocks_of():
        met = block(x)
        assert not torch.allclose(met[:1], block(x[:1]), rtol=1e-3)
        block.eval()
        assert block(x) is x
        with as_group(block):
            assert torch.equal(block(x), met)
        assert block(x) is x


def test_weights_are_pure() -> None:
    for block, x in blocks_of():
        before, noted = {k: v.clone() for k, v in block.state_dict().items()}, set(vars(block))
        first = block.weights(x)
        assert torch.equal(block.eval().weights(x), first)
        assert all(torch.equal(v, before[k]) for k, v in block.state_dict().items()) and set(vars(block)) == noted


def test_some_samples_keep_plain_features() -> None:
    block, x = stirred(BatchFormer(8, keep=0.5)), torch.randn(400, 8)
    torch.manual_seed(3)
    y = block(x)
    kept = (y == x).all(1)
    assert 140 < int(kept.sum()) < 260
    torch.manual_seed(3)
    assert torch.equal(block(x), y)  # gradient caching runs a group again with its seed
    with as_group(block.eval()):
        met = block(x)
    assert not (met == x).all(1).any()
    assert torch.allclose(y[~kept], met[~kept], atol=1e-6)


@pytest.mark.parametrize(
    "make", [lambda: BA2M(8), lambda: BA2M(8, positions=2, fuse="max", weight="full"), lambda: BatchFormer(8, keep=0.0)]
)
def test_gradients_reach_every_parameter(make) -> None:
    """At the first step only the last, zero-initialised layers get gradients; after some steps all parameters do."""
    block = make()
    x = torch.randn(6, 8, 4, 4) if isinstance(block, BA2M) else torch.randn(6, 8)
    aim = torch.randn_like(x)
    optimizer = torch.optim.SGD(block.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        ((block(x) - aim) ** 2).sum().backward()
        reached = {name for name, p in block.named_parameters() if p.grad.abs().max() > 1e-9}
        assert reached, step
        optimizer.step()
    assert reached == dict(block.named_parameters()).keys()


def half(block: nn.Module, x: Tensor, rank: int, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the output of a process with the same parameters for its half of the samples."""
    process = copy.copy(block)
    process.gather, process.own = gather, lambda whole: whole.chunk(2)[rank]
    return process(x.chunk(2)[rank])


def test_two_processes_are_one_group() -> None:
    """Each process runs its half with the rows of the other; values and gradients equal those of the whole group."""
    for block, x in blocks_of(6):
        aim, sent = torch.randn_like(x), []

        def note(part: Tensor, sent: list[Tensor] = sent) -> Tensor:
            sent.append(part)  # with its graph: the collective returns the gradient to the process that sent the part
            return torch.cat([part, part])

        def both(part: Tensor, sent: list[Tensor] = sent) -> Tensor:
            assert any(torch.equal(part, own) for own in sent)
            return torch.cat(sent)

        whole = block(x)
        (whole * aim).sum().backward()
        expected = {name: p.grad.clone() for name, p in block.named_parameters()}
        block.zero_grad()
        for rank in (0, 1):
            half(block, x, rank, note)
        output = torch.cat([half(block, x, rank, both) for rank in (0, 1)])
        assert torch.allclose(output, whole, rtol=1e-10)
        (output * aim).sum().backward()
        for name, p in block.named_parameters():
            assert torch.allclose(p.grad, expected[name], rtol=1e-8, atol=1e-8), name


def test_only_what_is_needed_is_gathered() -> None:
    shapes: list[tuple[int, ...]] = []

    def gather(part: Tensor) -> Tensor:
        shapes.append(tuple(part.shape))
        return part

    for weight in ("sample", "channel", "full"):
        block = BA2M(16, weight=weight)
        block.gather = gather
        block(torch.randn(3, 16, 4, 4))
    former = BatchFormer(16)
    former.gather = gather
    former(torch.randn(3, 16))
    assert shapes == [(3, 1, 1, 1), (3, 16, 1, 1), (3, 16, 4, 4), (3, 32)]


@pytest.mark.parametrize("size", [1e6, 1e-20, 0.0])
def test_extreme_features_stay_finite(size: float) -> None:
    for block in (stirred(BA2M(8)), stirred(BA2M(8, weight="full", fuse="max")), stirred(BatchFormer(8))):
        x = (size * torch.randn(5, *((8, 4, 4) if isinstance(block, BA2M) else (8,)))).requires_grad_()
        y = block(x)
        y.sum().backward()
        assert all(v.isfinite().all() for v in (y, x.grad, *(p.grad for p in block.parameters())))


@EVERY
def test_bfloat16(name: str) -> None:
    encoder = stirred(create_encoder("tiny", size=12, channels=1, attend=name)).train()
    x = torch.randn(4, 1, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        rows = encoder(x)
    rows.float().square().sum().backward()
    assert rows.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in blocks(encoder).parameters())
    if name == "ba2m":
        maps = torch.randn(4, 32, 6, 6).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            output = blocks(encoder)[0](maps)
            assert output.dtype == torch.bfloat16
            weights = blocks(encoder)[0].weights(maps)
        assert weights.dtype == torch.float32 and torch.allclose(weights.mean(), torch.ones(()), atol=1e-5)


BACKBONES = [
    ("resnet10", 32, {}, 4),
    ("resnet10", 64, {"stem": "imagenet"}, 4),
    ("torchvision/resnet18", 32, {}, 8),
    ("tiny", 20, {}, 3),
]


@pytest.mark.grid(3)
@EVERY
@pytest.mark.parametrize(("backbone", "size", "more", "count"), BACKBONES)
def test_evaluation_does_not_depend_on_other_samples(
    name: str, backbone: str, size: int, more: dict, count: int
) -> None:
    encoder = stirred(create_encoder(backbone, size=size, channels=1, attend=name, **more)).eval()
    assert len(blocks(encoder)) == (1 if name == "batchformer" else count)
    assert not encoder.training and not any(block.training for block in blocks(encoder))
    x = torch.randn(5, 1, size, size)
    with torch.no_grad():
        rows = encoder(x)
        scale = 1e-4 * rows.abs().max()
        assert torch.allclose(rows[2:3], encoder(x[2:3]), rtol=1e-3, atol=scale)
        assert torch.allclose(rows.flip(0), encoder(x.flip(0)), rtol=1e-3, atol=scale)
        plain = without(encoder)
        assert not blocks(plain) and plain.attend is None and len(blocks(encoder)) == len(encoder.slots)
        same = torch.equal(plain(x), rows)
        assert same == mixes_in_training_only(name)
        if same:
            with as_group(encoder):
                assert not torch.allclose(encoder(x), rows, rtol=1e-3, atol=scale)


@EVERY
def test_every_block_learns_inside_an_encoder(name: str) -> None:
    encoder = create_encoder("tiny", size=12, channels=1, attend=name)
    head, x = nn.Linear(96, 6), torch.randn(6, 1, 12, 12)
    optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(encoder(x)), torch.arange(6)).backward()
        optimizer.step()
    reached = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in blocks(encoder).parameters()]
    assert reached and all(reached)


@pytest.mark.parametrize("name", MET)
def test_a_momentum_copy_and_a_checkpoint_keep_the_blocks(name: str) -> None:
    encoder = stirred(create_encoder("torchvision/resnet18", size=32, attend=name)).train()
    twin, x = copy.deepcopy(encoder), torch.randn(3, 3, 32, 32)
    twin.load_state_dict(encoder.state_dict())
    torch.manual_seed(0)
    features = encoder(x)
    torch.manual_seed(0)
    assert torch.equal(twin(x), features)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in encoder.parameters()}


@pytest.mark.grid(1)
@EVERY
@pytest.mark.parametrize(
    ("backbone", "size", "options"),
    [("resnet10", 32, {"stages": [2, 4]}), ("torchvision/resnet18", 32, {}), ("tiny", 20, {"stages": (3, 1)})],
)
def test_saved_and_loaded(tmp_path: Path, name: str, backbone: str, size: int, options: dict) -> None:
    options = {} if name == "batchformer" else options
    encoder = stirred(create_encoder(backbone, size=size, channels=1, attend=name, attend_options=options)).eval()
    save_encoder(encoder, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again, x = load_encoder(tmp_path), torch.randn(4, 1, size, size)
    assert again.attend == encoder.attend and again.slots == encoder.slots
    assert set(again.state_dict()) == set(encoder.state_dict())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in encoder.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(x), encoder(x))
    started = create_encoder(backbone, size=size, channels=1, attend=name, attend_options=options, init=tmp_path)
    assert all(torch.equal(v, started.state_dict()[k]) for k, v in encoder.state_dict().items())


@pytest.mark.grid(2)
@EVERY
def test_saved_weights_have_the_names_of_the_backbone(tmp_path: Path, name: str) -> None:
    """The backbone loads into any model of the library; timm's part of config.json, which implies more, is left out."""
    encoder = create_encoder("resnet10", size=96, attend=name)
    save_encoder(encoder, tmp_path)
    assert list(json.loads((tmp_path / "config.json").read_text())) == ["inbatch"]
    weights = load_file(tmp_path / "model.safetensors")
    theirs = timm.create_model("resnet18", layers=[1, 1, 1, 1], num_classes=0)
    theirs.load_state_dict({k: v for k, v in weights.items() if not k.startswith("attend.")})
    assert len([k for k in weights if k.startswith("attend.")]) == len(blocks(encoder).state_dict())


@pytest.mark.slow
def test_weights_go_into_the_backbone_and_blocks_start_fresh(tmp_path: Path) -> None:
    plain = stirred(create_encoder("torchvision/resnet18", size=32))
    save_encoder(plain, tmp_path / "plain")
    torch.save(plain.backbone.state_dict(), tmp_path / "plain.pt")
    for init in (tmp_path / "plain", tmp_path / "plain.pt"):
        for name in ATTENDS:
            encoder = create_encoder("torchvision/resnet18", size=32, attend=name, init=init)
            loaded = without(encoder).backbone.state_dict()
            assert all(torch.equal(v, loaded[k]) for k, v in plain.backbone.state_dict().items())
    # Samples interact in training only: without its blocks the encoder computes the same.
    met = stirred(create_encoder("resnet10", size=32, attend="ba2m"))
    save_encoder(met, tmp_path / "met")
    for options in ({"attend": None}, {"attend": "ba2m", "attend_options": {"stages": [4]}}, {"attend": "batchformer"}):
        again = create_encoder("resnet10", size=32, init=tmp_path / "met", **options).eval()
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(again(x), met.eval()(x))
        assert all(b.gain.item() == 0 for b in blocks(again) if isinstance(b, BA2M))


def test_weights_that_need_their_blocks(tmp_path: Path) -> None:
    save_encoder(create_encoder("resnet10", size=32, attend="se"), tmp_path)
    for asked in (None, "eca"):
        with pytest.raises(ConfigError, match="trained with attend='se'"):
            create_encoder("resnet10", size=32, init=tmp_path, attend=asked)
    with pytest.raises(ConfigError, match="pass its folder"):
        create_encoder("resnet10", size=32, init=tmp_path / "model.safetensors", attend="se")


@pytest.mark.grid(11)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attend": "ba2n"}, "did you mean ba2m"),
        ({"attend": "xyz"}, "there are ba2m, batchformer, se, eca, cbam"),
        ({"attend": "ba2m", "attend_options": {"reductoin": 4}}, "did you mean reduction"),
        ({"attend": "ba2m", "attend_options": {"fuse": "mean"}}, '"sum" or "max"|Literal'),
        ({"attend": "ba2m", "attend_options": {"weight": "pixel"}}, "channel"),
        ({"attend": "ba2m", "attend_options": {"positions": 0}}, "positions of 1 or more"),
        ({"attend": "ba2m", "attend_options": {"reduction": "4"}}, "cannot be built"),
        ({"attend": "ba2m", "attend_options": {"fuse": print}}, "JSON"),
        ({"attend": "ba2m", "attend_options": {"stages": [0, 1]}}, "stages 1 to 4"),
        ({"attend": "ba2m", "attend_options": {"stages": 2}}, "stages 1 to 4"),
        ({"attend": "ba2m", "attend_options": {"stages": [4]}, "name": "tiny"}, "stages 1 to 3"),
        ({"attend": "batchformer", "attend_options": {"stages": [4]}}, "follows the pooling"),
        ({"attend": "batchformer", "attend_options": {"heads": 5}}, "divisor"),
        ({"attend": "batchformer", "attend_options": {"keep": 1.0}}, "below 1"),
        ({"attend": "batchformer", "attend_options": {"hidden_dim": 0}}, "hidden_dim"),
        ({"attend": "eca", "attend_options": {"kernel": 4}}, "odd"),
        ({"attend": "cbam", "attend_options": {"kernel": 4}}, "odd"),
        ({"attend": "se", "attend_options": {"reduction": 0}}, "cannot be built"),
        ({"attend_options": {"heads": 4}}, "name it with attend="),
        ({"attend": "ba2m", "name": "seresnet18"}, "attention of its own"),
        ({"attend": "ba2m", "name": "vit_tiny_patch16_224", "patch_size": 8, "depth": 1}, "batchformer"),
        ({"attend": "se", "name": "torchvision/mobilenet_v3_small"}, "batchformer"),
    ],
)
def test_wrong_settings(arguments: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        create_encoder(**{"name": "resnet10", "size": 32} | arguments)


@pytest.mark.grid(1)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "seresnet18", "torchvision/mobilenet_v3_small"])
def test_batchformer_works_with_any_encoder(name: str) -> None:
    more = {"patch_size": 8, "depth": 1} if name.startswith("vit") else {}
    encoder = stirred(create_encoder(name, size=32, attend="batchformer", **more)).eval()
    x = torch.randn(3, 3, 32, 32)
    assert encoder.slots == ("pooled",)
    assert torch.equal(encoder(x), without(encoder)(x))


@pytest.mark.grid(2)
@pytest.mark.parametrize(
    ("backbone", "slot"),
    [("resnet26", "backbone.layer1.0.se"), ("skresnet18", "backbone.layer1.0.se"),
     ("res2net50_14w_8s", "backbone.layer1.0.se"), ("resnest14d", "backbone.layer1.0.bn3.1"),
     ("torchvision/resnet18", "backbone.layer1.0.bn2.1"), ("tiny", "backbone.1.1")],
)  # fmt: skip
def test_the_slot_is_before_the_sum(backbone: str, slot: str) -> None:
    encoder = create_encoder(backbone, size=32, attend="ba2m", attend_options={"stages": [1]})
    assert encoder.slots[0] == slot
    with torch.no_grad():
        encoder(torch.randn(2, 3, 32, 32))


def conv_flops(inputs: int, outputs: int, kernel: int, positions: int) -> int:
    return 2 * inputs * outputs * kernel**2 * positions


def test_flops_counted_by_hand() -> None:
    """tiny at 20 pixels: maps of 32x20x20, 64x10x10 and 96x10x10; attention on at most 16x16 positions."""
    flops = parameters = 0
    for c, side in ((32, 20), (64, 10), (96, 10)):
        full, small = side**2, 10**2  # 20 positions a side are pooled to 10
        r = 8
        flops += conv_flops(c, r, 1, 1) + conv_flops(r, c, 1, 1)
        flops += conv_flops(c, r, 1, full) + conv_flops(r, r, 3, full) + conv_flops(r, c, 1, full)
        flops += conv_flops(c, 3 * r, 1, small) + 2 * (2 * small * small * r) + conv_flops(r, c, 1, small)
        parameters += (2 * c * r + r) + (2 * c * r + 9 * r * r + r) + (4 * c * r) + 1
    encoder = create_encoder("tiny", size=20, channels=1, attend="ba2m")
    before = encoder.training, {k: v.clone() for k, v in encoder.state_dict().items()}
    costs = added(encoder)
    assert (costs["blocks"], costs["flops"], costs["parameters"]) == (3, flops, parameters)
    plain = conv_flops(1, 32, 3, 400) + conv_flops(32, 64, 3, 100) + conv_flops(64, 96, 3, 100)
    assert costs["flops_share"] == pytest.approx(flops / plain)
    assert costs["parameters_share"] == pytest.approx(parameters / 74_400)
    assert encoder.training == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in encoder.state_dict().items())
    assert attention(encoder, 8).startswith(f"ba2m in 3 blocks, +{parameters:,} parameters (18.9%)")


def test_flops_of_attention_over_samples_grow_with_the_group() -> None:
    encoder = create_encoder("tiny", size=20, channels=1, attend="batchformer")
    for group in (2, 64):
        assert added(encoder, group)["flops"] == 2 * 96 * 96 * 6 + 2 * 2 * group * 96
    assert attention(encoder, 64).startswith("batchformer behind the pooling, +")
    encoder.pooled.gather = lambda part: pytest.fail("asked other ranks")
    assert added(encoder)["blocks"] == 1


PAGE = Path(__file__).resolve().parents[2] / "docs" / "context" / "attend.md"


@pytest.mark.slow
def test_the_page_s_code_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        scope: dict = {}
        with monkeypatch.context() as patch:
            patch.setitem(ATTENDS, "contrast", None)
            exec(code, scope)
            encoder, x = scope["encoder"], torch.randn(3, 3, 32, 32)
            met = encoder.train()(x)
            assert torch.equal(encoder.eval()(x), without(encoder)(x)) and not torch.equal(met, encoder(x))
            save_encoder(encoder, tmp_path)
            assert torch.equal(load_encoder(tmp_path)(x), encoder(x))


@pytest.mark.parametrize(("heading", "maker"), [("## BA2M", BA2M), ("## BatchFormer", BatchFormer)])
def test_the_page_s_options_are_the_constructor_s(heading: str, maker: type) -> None:
    _, *options = inspect.signature(maker).parameters.values()
    part = PAGE.read_text().split(heading)[1].split("| --- | --- | --- |\n")[1].split("\n\n")[0]
    table = [[cell.strip(" `") for cell in row.strip("|").split("|")][:2] for row in part.splitlines()]
    assert [name for name, _ in table] == [p.name for p in options]
    assert all(p.default is None or default == str(p.default) for (_, default), p in zip(table, options, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "part"), [(32, 1), (224, 2)])
def test_the_page_s_costs_are_counted(size: int, part: int) -> None:
    table = PAGE.read_text().split("| block | parameters |")[part].split("\n\n")[0]
    for name in ATTENDS:
        cost = added(create_encoder("resnet18", size=size, attend=name), 256)
        row = f"| `{name}` | {cost['parameters']:,} | {cost['parameters_share']:.2%} | "
        assert row + f"{cost['flops'] / 1e6:.3g} | {cost['flops_share']:.2%} |" in table
