import copy
import math

import pytest
import torch
from torch import nn

from inbatch import api
from inbatch.errors import ConfigError
from inbatch.models import create_encoder
from inbatch.training import optim, summary
from inbatch.training.rates import logged_rate


def network():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    return {"encoder": encoder, "predictor": nn.Linear(5, 5)}


def gradients(modules, step):
    generator = torch.Generator().manual_seed(step)
    for module in modules.values():
        for p in module.parameters():
            p.grad = torch.randn(p.shape, generator=generator)


def groups_of(modules, **options):
    return optim.parameter_groups(modules, **({"lr": 0.2, "weight_decay": 0.01} | options))


@pytest.mark.parametrize("lr_in_buffer", [False, True])
def test_lars_equals_a_loop_over_parameters(lr_in_buffer):
    modules = network()
    ours = optim.build_optimizer("lars", groups_of(modules), lr_in_buffer=lr_in_buffer)
    slow = [p.detach().clone() for m in modules.values() for p in m.parameters()]
    buffers = [torch.zeros_like(p) for p in slow]
    for step, factor in enumerate((0.1, 1.0, 0.5)):
        gradients(modules, step)
        optim.set_learning_rate(ours, factor)
        ours.step()
        lr, live = 0.2 * factor, [p for m in modules.values() for p in m.parameters()]
        for p, q, buffer in zip(live, slow, buffers, strict=True):
            d = p.grad.clone()
            if p.ndim > 1:
                d += 0.01 * q
                d *= 0.001 * q.norm() / d.norm()
            buffer.mul_(0.9).add_(d * (lr if lr_in_buffer else 1))
            q.sub_(buffer * (1 if lr_in_buffer else lr))
            torch.testing.assert_close(p.detach(), q, rtol=1e-6, atol=1e-7)


def train(optimizer, modules, steps):
    for step in steps:
        gradients(modules, step)
        optim.set_learning_rate(optimizer, 1 / (step + 1))
        optimizer.step()


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_resumed_optimiser_continues_bit_for_bit(name):
    whole, resumed = network(), network()
    train(optim.build_optimizer(name, groups_of(whole)), whole, range(4))

    first = optim.build_optimizer(name, groups_of(resumed))
    train(first, resumed, range(2))
    second = optim.build_optimizer(name, groups_of(resumed))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, resumed, range(2, 4))

    for part in whole:
        for p, q in zip(whole[part].parameters(), resumed[part].parameters(), strict=True):
            assert torch.equal(p, q)


def test_lars_leaves_gradients_and_parameters_without_gradient_alone():
    modules = network()
    gradients(modules, 0)
    frozen = modules["predictor"].weight
    frozen.grad = None
    before = frozen.detach().clone()
    kept = [p.grad.clone() for p in modules["encoder"].parameters()]
    optim.build_optimizer("lars", groups_of(modules)).step()
    assert torch.equal(frozen, before)
    assert all(torch.equal(p.grad, g) for p, g in zip(modules["encoder"].parameters(), kept, strict=True))


def test_groups_hold_every_trainable_parameter_once():
    modules = network()
    modules["encoder"][0].bias.requires_grad_(False)
    modules["again"] = modules["predictor"]
    groups = groups_of(modules)
    held = [p for g in groups for p in g["params"]]
    assert [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in groups] == [(0.01, {4, 2}), (0, {1})]
    assert len(held) == len(set(held)) == 7
    assert [g["weight_decay"] for g in groups_of(modules, exclude_norm_and_bias=False)] == [0.01]


def test_parts_and_vectors_with_their_own_rates():
    groups = groups_of(network(), vector_lr=0.0048, own={"predictor": {"lr": 0.05, "constant": True}})
    counts = {(g["lr"], g["weight_decay"], g["constant"]): len(g["params"]) for g in groups}
    assert counts == {(0.2, 0.01, False): 2, (0.0048, 0, False): 4, (0.05, 0.01, True): 1, (0.05, 0, True): 1}

    optimizer = optim.build_optimizer("sgd", groups)
    optim.set_learning_rate(optimizer, 0.5, decay_factor=10)
    assert {(g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {
        (0.1, 0.1),
        (0.0024, 0),
        (0.05, 0.1),
        (0.05, 0),
    }
    assert all(g["momentum"] == 0.9 for g in optimizer.param_groups)


def test_scaled_lr():
    assert optim.scaled_lr(0.3, 4096, "linear") == pytest.approx(4.8)
    assert optim.scaled_lr(0.075, 4096, "sqrt") == pytest.approx(0.075 * math.sqrt(4096))
    assert optim.scaled_lr(0.03, 4096, "none") == 0.03


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: optim.build_optimizer("lrs", groups_of(network())), "Did you mean 'lars'"),
        (lambda: optim.build_optimizer("sgd", groups_of(network()), momentun=0.5), "Did you mean 'momentum'"),
        (lambda: optim.scaled_lr(1, 1, "quadratic"), "Choose from linear, none, sqrt"),
        (lambda: groups_of(network(), own={"projector": {}}), "the parts are encoder, predictor"),
        (lambda: groups_of(network(), own={"encoder": {"rate": 1}}), "Unknown setting rate"),
        (lambda: groups_of({"pool": nn.Flatten()}), "Nothing to train"),
    ],
)
def test_mistakes_are_explained(call, sentence):
    with pytest.raises(ConfigError, match=sentence):
        call()


def test_layer_decay_of_timm_and_of_other_backbones():
    """A ResNet of timm by blocks, a ViT by blocks, others by their parts; the last layer has the decay itself."""
    for name, size, first, last, count in (
        ("resnet10", 64, "conv1.weight", "layer4.0.conv2.weight", 5),
        ("test_vit", 160, "patch_embed.proj.weight", "blocks.5.mlp.fc2.weight", 7),
        ("tiny", 20, "0.weight", "7.bias", 3),
        ("fast", 32, "stages.0.0.weight", "stages.4.body.1.0.weight", 5),
        ("torchvision/resnet18", 64, "conv1.weight", "layer4.1.bn2.bias", 5),
    ):
        backbone = create_encoder(name, size=size).backbone
        scales = optim.layer_scales(backbone, 0.5)
        parameters = dict(backbone.named_parameters())
        assert len(scales) == len(parameters)
        assert scales[parameters[first]] == 0.5**count and scales[parameters[last]] == 0.5, name


def test_layer_decay_of_the_optimiser_and_the_heads():
    options = {"settings": {"optimizer.layer_decay": 0.5}, "subset": 80, "batch_size": 40, "epochs": 1}
    decayed = api.prepare("digits-canvas", "simclr", device="cpu", **options)
    rates = {p: group["lr"] for group in decayed.optimizer.param_groups for p in group["params"]}
    base = {group["base_lr"] for group in decayed.optimizer.param_groups}
    assert base == {decayed.lr * 0.5**n for n in range(4)}
    heads = [p for p in decayed.network.heads.parameters() if p.requires_grad]
    assert {rates[p] for p in heads} == {logged_rate(decayed.optimizer, decayed.lr)}
    assert "layer decay 0.5 down to 0.00025" in summary.describe(decayed)
    for wrong in (0, 1.5, "a"):
        with pytest.raises(ConfigError, match=r"optimizer\.layer_decay"):
            api.prepare("digits-canvas", settings={"optimizer.layer_decay": wrong})


@pytest.mark.parametrize("option", ["lr", "momentum", "weight_decay", "eta"])
def test_lars_takes_no_options_below_0(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} = -1 is below 0"):
        optim.LARS([torch.nn.Parameter(torch.ones(1))], **{"lr": 0.1, option: -1})
