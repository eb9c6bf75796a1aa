"""Every method with every plug-in, and with every two: two steps are trained, or one sentence refuses them."""

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_methods import small_settings

from inbatch import api
from inbatch.context.curation import CURATORS
from inbatch.context.fusion import FUSIONS
from inbatch.context.mixing import MIXERS
from inbatch.context.negatives import NEGATIVES
from inbatch.data.samplers import SAMPLERS
from inbatch.data.views import Views
from inbatch.data.views.crop_pairs import CROPS
from inbatch.errors import ConfigError
from inbatch.methods import METHODS
from inbatch.models import create_encoder, save_encoder
from inbatch.models.attention_slots import ATTENDS
from inbatch.training.build import RunComponents

PLUGS: dict[str, list[Any]] = {
    "fuse": [*FUSIONS], "attend": [*ATTENDS], "curate": [*CURATORS], "mix": [*MIXERS], "negatives": [*NEGATIVES],
    "sampler": [*SAMPLERS], "crops": [name for name in CROPS if name != "default"], "shuffle_groups": [True],
    "joint_norm": [True], "variance_weight": [0.5],
}  # fmt: skip
"""Setting -> values other than the default."""


def refused(method: str, kind: str, value: Any) -> bool:
    """Return whether the method does not allow a plug-in, by its equation."""
    if kind == "mix":
        return METHODS[method].mixed_keys is None
    return kind == "negatives" and value not in METHODS[method].negatives


def pairwise(method: str) -> list[dict[str, Any]]:
    """Return combinations in which every two values of different plug-ins that the method allows occur together."""
    draw, rows = random.Random(0), []
    values = {kind: [v for v in choices if not refused(method, kind, v)] for kind, choices in PLUGS.items()}
    left = {
        frozenset([(a, x), (b, y)])
        for a, b in itertools.combinations(values, 2) for x in values[a] for y in values[b]
    }  # fmt: skip
    while left:
        row = dict(min(left, key=lambda pair: sorted(map(str, pair))))
        for kind in draw.sample([*values], len(values)):
            if kind not in row and values[kind]:
                row[kind] = max(values[kind], key=lambda v, k=kind, r=row: sum(
                    frozenset([(k, v), pair]) in left for pair in r.items()))  # fmt: skip
        left -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write images with labels and groups, and the folder of a teacher."""
    folder = tmp_path_factory.mktemp("data")
    images = np.random.default_rng(0).integers(256, size=(64, 12, 12, 3), dtype=np.uint8)
    np.savez(folder / "v.npz", images=images, labels=np.arange(64) % 4, video=np.arange(64) // 2)
    torch.manual_seed(0)
    save_encoder(create_encoder("fast", size=12, width=4), folder / "teacher")
    return {"images": folder / "v.npz", "teacher": folder / "teacher"}


def sentence(data: dict[str, Path], method: str, plugs: dict[str, Any]) -> str:
    """Train two steps of the second epoch; return why they are refused, or an empty text."""
    options: dict[str, Any] = small_settings(method)
    if method == "swav":
        options["method.queue_size"] = 0  # with a queue, images cannot be mixed
    if METHODS[method].teacher:
        options["teacher"] = str(data["teacher"])
    options |= {"encoder.name": "tiny", "image_size": 12, "group_column": "video", "context": 8}
    options |= {"views.name": "simclr_cifar", "views.num_views": 2}  # pairs of crops, and curation, compare two views
    options |= {kind if kind in ("crops", "shuffle_groups", "joint_norm", "variance_weight") else f"{kind}.name": value
                for kind, value in plugs.items()}  # fmt: skip
    try:
        built = api.prepare(data["images"], method, batch_size=16, epochs=2, device="cpu", settings=options)
    except ConfigError as error:
        return str(error)
    first = next(built.network.parameters())
    before = first.detach().clone()
    for step, batch in zip(range(2), built.loader.epoch(1), strict=False):
        losses = built.step(batch, built.loader.steps + step)
    assert torch.isfinite(torch.as_tensor(losses["loss"])) and not torch.equal(first, before)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLUGS)
@pytest.mark.parametrize("method", METHODS)
def test_every_plug_in_trains_or_is_refused_in_one_sentence(method: str, kind: str, data: dict[str, Path]) -> None:
    for value in PLUGS[kind]:
        message = sentence(data, method, {kind: value})
        assert bool(message) == refused(method, kind, value), (value, message)
        if message:
            assert "\n" not in message and (f"{kind} {value}" in message or kind in message), message


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_two_plug_ins_train_together_with_every_method(method: str, data: dict[str, Path]) -> None:
    for plugs in pairwise(method):
        assert not sentence(data, method, plugs), plugs


def in_float64(data: dict[str, Path], plugs: dict[str, Any], channels_last: bool = True) -> RunComponents:
    """Return a run of SimCLR in float64, with SGD; the views must be in float64, too (`wide_views`)."""
    options = {kind if kind in ("crops", "shuffle_groups", "joint_norm", "variance_weight") else f"{kind}.name": value
               for kind, value in plugs.items()}  # fmt: skip
    options |= {"encoder.name": "tiny", "image_size": 12, "group_column": "video", "context": 8, "precision": "float32"}
    options |= {"optimizer.name": "sgd", "views.name": "simclr_cifar", "channels_last": channels_last}
    built = api.prepare(data["images"], "simclr", batch_size=16, epochs=2, device="cpu", settings=options)
    for part in (built.network, built.method, built.step.curator):
        if part is not None:
            part.double()
    return built


@pytest.fixture
def wide_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw views in float64."""
    drawn = Views.__call__
    monkeypatch.setattr(
        Views, "__call__",
        lambda views, batch: replace(one := drawn(views, batch), images=tuple(x.double() for x in one.images)),
    )  # fmt: skip


def test_the_memory_layout_changes_no_step(data: dict[str, Path], wide_views: None) -> None:
    """Every plug-in learns by the same gradients in channels-last and contiguous memory."""
    for kind in ("fuse", "attend", "curate", "mix", "joint_norm"):
        for value in PLUGS[kind]:
            weights = []
            for channels_last in (True, False):
                built = in_float64(data, {kind: value}, channels_last)
                for number, batch in zip(range(2), built.loader.epoch(1), strict=False):
                    built.step(batch, built.loader.steps + number)
                weights.append(dict(built.network.named_parameters()))
            for name, plain in weights[1].items():
                torch.testing.assert_close(
                    weights[0][name], plain, rtol=1e-9, atol=1e-11, msg=f"{kind} {value}: {name}"
                )


def test_gradients_are_the_derivatives_of_the_loss(data: dict[str, Path], wide_views: None) -> None:
    """With every plug-in, the gradient of a step agrees with finite differences of its loss, for each part."""
    kinds = ("fuse", "attend", "mix", "negatives", "curate", "joint_norm", "variance_weight", "shuffle_groups")
    for plug in ((kind, value) for kind in kinds for value in PLUGS[kind] if not refused("simclr", kind, value)):
        built = in_float64(data, dict([plug]))
        parameters, batch = dict(built.network.named_parameters()), next(iter(built.loader.epoch(1)))
        noise = torch.Generator().manual_seed(0)
        for parameter in parameters.values():  # a plug-in may begin as the identity
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
        start = {name: x.clone() for name, x in built.network.state_dict().items()}
        built.optimizer.step = lambda: None
        built.step(batch, built.loader.steps)
        gradients = {name: x.grad.clone() for name, x in parameters.items() if x.grad is not None}
        for part in {name.split(".")[0] for name in gradients}:
            own = [name for name in gradients if name.startswith(f"{part}.")]
            directions = [torch.randn(gradients[n].shape, generator=noise, dtype=torch.float64) for n in own]
            losses = []
            for sign in (1, -1):
                built.network.load_state_dict(start)
                for name, direction in zip(own, directions, strict=True):
                    parameters[name].data += sign * 1e-8 * direction
                losses.append(float(built.step(batch, built.loader.steps)["loss"]))
            products = [(gradients[n] * d).sum() for n, d in zip(own, directions, strict=True)]
            error, size = (
                abs(float(sum(products)) - (losses[0] - losses[1]) / 2e-8),
                float(torch.stack(products).norm()),
            )
            assert error < 1e-2 * size, f"{plug}: {part}, {error} of {size}"
