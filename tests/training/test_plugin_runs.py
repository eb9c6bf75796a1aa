"""Every plug-in with every method in whole runs: they train, resume, repeat from their recipes, or are refused."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from small_methods import small_settings
from small_runs import assert_same_state, saved, stop_after, tiny

import inbatch
from inbatch import api
from inbatch.data.views.crop_pairs import CROPS
from inbatch.errors import ConfigError, Preempted
from inbatch.methods import METHODS
from inbatch.models.attention_slots import blocks
from inbatch.training.recipe import make
from inbatch.training.settings_file import parse_assignment

COMBINATIONS = list(itertools.product((None, "conv", "set"), (False, True), (None, "ba2m", "batchformer")))


def fields(method: str, fuse: str | None, curate: bool, attend: str | None) -> dict:
    """Return a recipe of 5 steps an epoch on the embedded digits, curated from the second epoch on."""
    options = small_settings(method)
    if curate:
        options["curate.name"] = "redraw"
    arguments = {
        "subset": 80,
        "batch_size": 16,
        "context": 8,
        "epochs": 2,
        "settings": options,
        "fuse": fuse,
        "attend": attend,
    }
    return {key: value for key, value in arguments.items() if value is not None}


@pytest.mark.grid(5)
@pytest.mark.parametrize(("fuse", "curate", "attend"), COMBINATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_every_combination_trains(method: str, fuse: str | None, curate: bool, attend: str | None) -> None:
    arguments = fields(method, fuse, curate, attend)
    built = api.prepare("digits-canvas", method, **arguments)
    plugged = [*blocks(built.encoder).named_parameters(), *(built.network.fuse.named_parameters() if fuse else ())]
    before = [p.detach().clone() for _, p in plugged]
    for step, batch in enumerate(itertools.islice(built.loader.epoch(1), 2)):
        losses = built.step(batch, built.loader.steps + step)
    assert torch.isfinite(torch.as_tensor(losses["loss"]))
    assert ("curate_rounds" in losses) == curate
    assert bool(plugged) == (fuse is not None or attend is not None)
    still = [name for (name, after), was in zip(plugged, before, strict=True) if torch.equal(after, was)]
    assert not still, "these were never trained"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "moco", "swav", "pcl"])
@pytest.mark.parametrize("stops", [(3,), (5,), (7,), (8,)])
def test_resuming_is_bit_exact(
    method: str, stops: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a warm-up epoch, at its end, and within a curated epoch, whose snapshot is older than the weights."""
    plugs = {"fuse": "conv", "attend": "batchformer", "shuffle_groups": True, "settings": {"curate.name": "redraw"}}
    tiny(method, tmp_path / "whole", **plugs)
    for i, step in enumerate(stops):
        with monkeypatch.context() as patch, pytest.raises(Preempted):
            stop_after(patch, step)
            tiny(method, tmp_path / "cut", resume=i > 0, **plugs)
    tiny(method, tmp_path / "cut", resume=True, **plugs)
    assert_same_state(saved(tmp_path / "cut"), saved(tmp_path / "whole"))


@pytest.mark.slow
def test_a_run_repeats_from_its_own_command_and_recipe(tmp_path: Path) -> None:
    settings = {"curate.name": "redraw", "curate.rule": "strict", "fuse.patch": 5, "views.name": "simclr_cifar"}
    settings |= {"encoder.name": "resnet10", "attend.stages": [2, 3], "subset": 80}
    built = api.prepare(
        "digits-canvas-colour", fuse="set", attend="ba2m", crops="intersection", shuffle_groups=True, batch_size=16,
        context=8, settings=settings | {"fuse.patch": 4},
    )  # fmt: skip
    again = inbatch.training.recipe.make(built.recipe.flat())
    assert again == built.recipe
    assert json.loads(json.dumps(built.recipe.nested()))["fuse"]["patch"] == 4
    words = built.recipe.command()
    for part in (
        "fuse.name=set",
        "attend.name=ba2m",
        "curate.rule=strict",
        "crops=intersection",
        "shuffle_groups=true",
    ):
        assert part in words
    assert built.recipe.attend.options["stages"] == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "moco"])
@pytest.mark.parametrize("crops", CROPS)
def test_every_crop_configuration_trains(method: str, crops: str) -> None:
    built = api.prepare(
        "digits-canvas-colour", method, crops=crops, subset=80, batch_size=16, epochs=1,
        settings={"views.name": "simclr_cifar"},
    )  # fmt: skip
    losses = built.step(next(iter(built.loader.epoch(0))), 0)
    assert torch.isfinite(torch.as_tensor(losses["loss"]))


@pytest.mark.grid(1)
@pytest.mark.parametrize("attend", ["ba2m", "batchformer", "se"])
def test_the_same_seed_is_the_same_start_with_and_without(attend: str) -> None:
    shared = {"subset": 80, "batch_size": 16, "settings": {"encoder.name": "resnet10"}}
    plain = api.prepare("digits-canvas", "byol", **shared)
    both = api.prepare("digits-canvas", "byol", **shared, attend=attend, fuse="conv")
    state = both.network.state_dict()
    for name, weight in plain.network.state_dict().items():
        assert torch.equal(state[name], weight), name


BAD = {
    "fuse.name = 'cnv' is unknown": {"settings": {"fuse.name": "cnv"}},
    "there is no fuse.name": {"settings": {"fuse.patch": 4}},
    "fuse conv has no setting 'pach'": {"settings": {"fuse.name": "conv", "fuse.pach": 4}},
    "does not divide views of 20 pixels": {"settings": {"fuse.name": "conv", "fuse.patch": 3}},
    "batch fusion has 0 to 3": {"settings": {"fuse.name": "conv", "fuse.layers": 4}},
    "no channel": {"settings": {"fuse.name": "conv", "fuse.bottleneck": 99}},
    "does not divide fuse.width": {"settings": {"fuse.name": "set", "fuse.heads": 3}},
    "numbered 0 to 1": {"settings": {"fuse.name": "set", "fuse.views": [2]}},
    "never be trained": {"method": "moco", "settings": {"fuse.name": "set", "fuse.views": [1]}},
    "curate.rounds = 0": {"settings": {"curate.name": "redraw", "curate.rounds": 0}},
    "curate.rule": {"settings": {"curate.name": "redraw", "curate.rule": "strickt"}},
    "there is nothing to shuffle": {"shuffle_groups": True},
    "crops = 'adjacnt' is unknown": {"crops": "adjacnt"},
    "does not divide": {"fuse": "conv", "context": 12},
    "compares the views of a sample": {
        "method": "supervised",
        "settings": {"views.name": "plain", "curate.name": "redraw"},
    },
    "momentum of the target network is 2": {"method": "byol", "settings": {"method.momentum": 2.0}},
    "momentum of the target network is -1": {"method": "mmcr", "settings": {"method.momentum": -1.0}},
    "widths of a head must be at least 1": {"method": "visreg", "settings": {"method.out_dim": 0}},
    "attend.name = 'ba3m'": {"attend": "ba3m"},
    "set attend": {"settings": {"encoder.attend": "ba2m"}},
}


@pytest.mark.parametrize("message", BAD)
def test_invalid_settings_are_refused_before_the_first_step(message: str) -> None:
    arguments = dict(BAD[message])
    method = arguments.pop("method", "simclr")
    with pytest.raises(ConfigError, match=message.replace("(", "\\(")):
        api.prepare("digits-canvas", method, subset=80, batch_size=16, epochs=1, **arguments)


@pytest.mark.slow
def test_dry_run_prints_the_plug_ins_and_their_parameters() -> None:
    arguments = {
        "subset": 80,
        "batch_size": 16,
        "context": 8,
        "settings": {"curate.name": "redraw"},
        "shuffle_groups": True,
    }
    report = api.dry_run("digits-canvas", "byol", fuse="conv", attend="ba2m", **arguments)
    words = report["description"]
    for part in ("fuse:    conv, ", "curate:  from epoch 7 on, ", "attend:  ba2m in 3 blocks", "groups:  shuffled"):
        assert part in words, words
    plain = api.dry_run("digits-canvas", "byol", subset=80, batch_size=16, context=8)
    more, less = report["memory_bytes_estimate"], plain["memory_bytes_estimate"]
    assert more["curator"] >= less["weights"] and less["curator"] == 0
    assert more["activations_of_a_group"] > less["activations_of_a_group"]
    assert report["parameters"]["fuse"] > 0 and report["rows"] == plain["rows"]


@pytest.mark.parametrize("text", ["fuse.target=none", "schedule.scaling=none"])
def test_none_can_be_the_name_of_a_choice(text: str) -> None:
    assert parse_assignment(text) == {text.partition("=")[0]: "none"}
    make({"data": "photos", "fuse.name": "conv"} | parse_assignment(text))
