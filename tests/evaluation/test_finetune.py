"""Fine-tuning: training all weights of a copy with labels."""

import copy
import json
import math

import pytest
import torch
from bars_data import bars, bars_run, command
from feature_sets import Pictures, clouds, encoder, pictures
from torch import nn
from torch.nn import functional as F

from inbatch.apps.cli.output import figures
from inbatch.batch import Batch
from inbatch.data.views import View, Views
from inbatch.errors import ConfigError, DataError, TrainingError
from inbatch.evaluation import TUNINGS, Finetune, evaluate, few_labels, finetune, tune
from inbatch.models import create_encoder
from inbatch.rng import fold, permutation

SHORT = Finetune(epochs=2, batch=8, steps=0)


class Frozen:
    """Encoder that is a function, not a module."""

    device, prepare, evaluating = torch.device("cpu"), torch.stack, torch.no_grad

    def __call__(self, x):
        return x.flatten(1)


def without_seconds(result):
    return {key: value for key, value in result.items() if key != "seconds"}


def slow_finetune(net, train, test, s, seed):
    """Fine-tune step by step; return the predictions for the test images."""
    torch.manual_seed(fold(seed))
    net, n = copy.deepcopy(net).train(), len(train)
    head = nn.Linear(net.width, 2)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    weights = [*net.parameters(), *head.parameters()]
    speed = [torch.zeros_like(w) for w in weights]
    images, steps, done = torch.stack(train.images), math.ceil(n / s.batch), 0
    views = Views([View(20, scale=(s.area, 1.0), flip=s.flip)], net.mean, net.std, fused=False)
    for epoch in range(s.epochs):
        for chosen in permutation(seed, epoch, n).tensor_split(steps):
            x = views(Batch(chosen, train.labels[chosen], seed, epoch, images=images[chosen])).images[0]
            gradients = torch.autograd.grad(F.cross_entropy(head(net(x)), train.labels[chosen]), weights)
            lr = s.lr * math.ceil(n / steps) / 256 * (1 + math.cos(math.pi * done / (s.epochs * steps))) / 2
            with torch.no_grad():
                for w, g, v in zip(weights, gradients, speed, strict=True):
                    g = g + s.weight_decay * w
                    v.mul_(s.momentum).add_(g)
                    w -= lr * (g + s.momentum * v)
            done += 1
    with net.evaluating():
        return head(net(net.prepare(torch.stack(test.images)))).argmax(1)


def test_fine_tuning_equals_the_slow_version():
    train, test, net = bars(30), bars(50, seed=1), encoder()
    settings = Finetune(epochs=3, batch=12, lr=0.4, steps=0, weight_decay=1e-3, area=0.5)
    result = finetune(net, train, test, settings, seed=3)
    right = (slow_finetune(net, train, test, settings, 3) == test.labels).double().mean().item()
    assert result["top1"] == pytest.approx(right, abs=1e-9) and result["steps"] == 9 and result["batch"] == 10


@pytest.mark.slow
def test_fine_tuning_learns_what_the_features_lack():
    settings = Finetune(epochs=12, batch=20, lr=0.5, steps=0, area=0.5)
    assert finetune(encoder(), bars(80), bars(60, seed=1), settings)["top1"] > 0.9


def test_encoder_is_not_changed_and_a_seed_repeats_itself():
    net, train, test = encoder(), bars(24), bars(40, seed=1)
    net.backbone.requires_grad_(False)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        result = finetune(net, train, test, SHORT, seed=1)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training and not any(p.requires_grad or p.grad is not None for p in net.backbone.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert without_seconds(finetune(net, train, test, SHORT, seed=1)) == without_seconds(result)
    assert result["seconds"] > 0


@pytest.mark.slow
def test_trained_weights_repeat_bit_for_bit_with_and_without_workers(monkeypatch):
    import importlib

    module, seen = importlib.import_module("inbatch.evaluation.finetune"), []
    embed = module.embed
    monkeypatch.setattr(module, "embed", lambda net, *a, **b: seen.append(net.state_dict()) or embed(net, *a, **b))
    monkeypatch.setattr(module, "hold_in_memory", lambda source: source)  # as if it were too large
    net, mixed = encoder(channels=3), pictures(20, sizes=((20, 20), (31, 90), (64, 23)), channels=3)
    for seed, workers in ((0, 0), (0, 1), (1, 0)):
        finetune(net, mixed, mixed, SHORT, seed=seed, workers=workers)
    one, other, another = seen
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert any(not torch.equal(value, another[name]) for name, value in one.items())


def test_share_and_steps_are_stated():
    train, test, net = bars(60), bars(20, seed=1), encoder()
    result = finetune(net, train, test, Finetune(epochs=1, batch=4, steps=7), share=0.1, seed=2)
    assert (result["images"], result["of_a_class"], result["steps"], result["epochs"]) == (6, [3, 3], 8, 4)
    assert result["lr_used"] == 0.05 * 3 / 256 and result["settings"] == "custom" and result["nesterov"] is True
    seen, image = set(), train.image
    train.image = lambda i: seen.add(i) or image(i)
    finetune(net, train, test, SHORT, share=0.1, seed=2)
    assert seen - {0, 1, 2} <= set(few_labels(train.labels, 0.1, 2).tolist())


def test_an_image_that_cannot_be_read_is_left_out():
    train, test = bars(12), bars(20, seed=1)
    image = train.image

    def broken(i):
        if i == 5:
            raise DataError("5 is damaged")
        return image(i)

    train.image = broken
    assert 0 <= finetune(encoder(), train, test, SHORT)["top1"] <= 1


def test_invalid_arguments_are_refused():
    train, test, net = bars(12), bars(8), encoder()
    with pytest.raises(ConfigError, match="choose one of small"):
        finetune(net, train, test, "large")
    with pytest.raises(ConfigError, match="share"):
        finetune(net, train, test, share=0.0)
    with pytest.raises(ConfigError, match="give a module like"):
        finetune(Frozen(), train, test)
    with pytest.raises(DataError, match="two classes"):
        finetune(net, Pictures(train.images, [0] * 12), test)
    with pytest.raises(TrainingError, match="diverged"):
        finetune(net, train, test, Finetune(epochs=3, steps=0, lr=1e30))
    for arguments in ((None, train, test), (net, clouds(9), test), (net, train, clouds(9))):
        with pytest.raises(ConfigError, match="finetune trains an encoder"):
            evaluate(*arguments, protocols=["finetune"])


def test_evaluate_passes_its_options_on():
    train, test, net = bars(20), bars(10, seed=1), encoder()
    evaluation = evaluate(net, train, test, protocols=["finetune"], tuning=SHORT, tuning_share=0.5, seed=4)
    expected = finetune(net, train, test, SHORT, share=0.5, seed=4)
    assert without_seconds(evaluation["finetune"]) == without_seconds(expected)
    assert json.loads(json.dumps(evaluation)) and figures(evaluation) == {"fine-tuned": expected["top1"]}


@pytest.mark.slow
def test_the_command_line(tmp_path, monkeypatch):
    folder = bars_run(tmp_path)
    monkeypatch.setitem(TUNINGS, "small", SHORT)
    result = command(f"evaluate {folder} --protocol finetune --tuning-share 0.2 --seed 3")
    assert result.exit_code == 0 and "fine-tuned" in result.stdout
    written = json.loads((folder / "evaluation.json").read_text())["finetune"]
    assert (written["share"], written["seed"], written["classes"], written["images"]) == (0.2, 3, 2, 8)
    assert command(f"evaluate {folder} --protocol finetune --tuning huge").exit_code == 2


def test_the_tuned_model_gives_the_figures_and_leaves_out_a_fitted_whitening():
    train, test = bars(24), bars(20, seed=1)
    net = create_encoder("tiny", size=20, channels=1, whiten=True)
    net.readout.fit(torch.randn(50, net.readout.width))
    figures = finetune(net, train, test, SHORT, seed=5)
    tuned = tune(net, train, SHORT, seed=5)
    assert net.readout is not None and tuned.encoder.readout is None and not tuned.encoder.training
    assert not any(p.requires_grad for p in (*tuned.encoder.parameters(), *tuned.head.parameters()))
    scores = tuned.head(torch.from_numpy(tuned.encoder.embed(torch.stack(test.images))))
    assert (scores.argmax(1) == test.labels).double().mean() == figures["top1"]
    assert tuned.protocol.items() <= figures.items() and tuned.protocol["images"] == 24
