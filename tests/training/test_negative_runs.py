"""The plug-in `negatives` in runs: every method that it fits trains, recipes repeat, wrong ones are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_methods import SMALL
from small_runs import assert_same_state, saved, stop_after

import inbatch
from inbatch import api
from inbatch.errors import ConfigError, DataError, Preempted
from inbatch.methods import METHODS
from inbatch.training.recipe import make

FITTING = [(method, kind) for method, one in METHODS.items() for kind in one.negatives]
TINY = {"encoder": "tiny", "batch_size": 16, "image_size": 12, "epochs": 1}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 48 images of 12 groups to a file."""
    file = tmp_path_factory.mktemp("data") / "v.npz"
    images = np.random.default_rng(0).integers(256, size=(48, 12, 12, 3), dtype=np.uint8)
    np.savez(file, images=images, labels=np.arange(48) % 3, video=np.arange(48) // 4, one=np.zeros(48, int))
    return file


@pytest.mark.grid(3)
@pytest.mark.parametrize(("method", "kind"), FITTING)
def test_every_method_that_it_fits_trains(method: str, kind: str, videos: Path) -> None:
    options = {f"method.{key}": value for key, value in SMALL.get(method, {}).items()} | {"group_column": "video"}
    built = api.prepare(videos, method, **TINY, negatives=kind, settings=options)
    plain = api.prepare(videos, method, **TINY, settings=options)
    bank = built.method.negative_bank() if kind == "drop-similar" else None
    for step, batch in enumerate(built.loader.epoch(0)):
        held = torch.zeros(0) if bank is None else bank.tags.clone()
        losses = built.step(batch, step)
    for step, batch in enumerate(plain.loader.epoch(0)):
        other = plain.step(batch, step)
    assert torch.isfinite(losses["loss"]) and losses["loss"] != other["loss"]
    assert ("dropped_pairs" in losses) == (kind == "drop-similar")
    if kind == "drop-similar":
        counts = torch.bincount(batch.group)
        pairs = int((counts * (counts - 1) // 2).sum()) + int((batch.group[:, None] == held).sum())
        assert losses["dropped_pairs"] == pairs > 0


def test_features_of_whole_images_find_copies() -> None:
    """Copies are found whatever the views are, resident and streamed, and no weight changes."""
    images = np.random.default_rng(0).integers(256, size=(16, 12, 12, 3), dtype=np.uint8)
    images = np.concatenate([images, images[:8]])
    for resident in (True, False):
        built = api.prepare(images, "simclr", **TINY | {"batch_size": 24}, negatives="drop-similar", workers=0,
                            settings={"negatives.threshold": 0.999, "cache_on_device": resident})  # fmt: skip
        before = {key: x.clone() for key, x in built.network.state_dict().items()}
        batch = next(iter(built.loader.epoch(0)))
        marked, figures = built.step.similar(batch, lambda x, dim: x, 0)
        assert figures == {"similar_pairs": 8.0, "dropped_pairs": 8.0}
        place = batch.index.argsort()
        assert torch.equal(marked.same[place[:8]], marked.same[place[16:]]) and built.network.training
        assert all(torch.equal(x, before[key]) for key, x in built.network.state_dict().items())
        assert torch.isfinite(built.step(batch, 0)["loss"])


@pytest.mark.grid(1)
@pytest.mark.parametrize("kind", ["drop-similar", "hard"])
def test_recipe_command_and_description(kind: str, videos: Path) -> None:
    built = api.prepare(videos, "simclr", **TINY, negatives=kind, settings={"group_column": "video"})
    recipe = built.recipe
    assert make(recipe.flat()) == recipe and json.loads(json.dumps(recipe.nested()))["negatives"]["name"] == kind
    assert f"negatives.name={kind}" in recipe.command() and "group_column=video" in recipe.command()
    dry = api.dry_run(videos, "simclr", **TINY, negatives=kind, settings={"group_column": "video"})["description"]
    assert f"negatives: {kind}" in " ".join(dry.split())


def test_earlier_rows_of_near_duplicates_are_not_negatives() -> None:
    """The bank keeps groups or features, and a sample's own earlier row is a near duplicate."""
    images = np.random.default_rng(0).integers(256, size=(16, 12, 12, 3), dtype=np.uint8)
    for settings in ({"negatives.threshold": 0.999}, {"negatives.by": "group"}):
        groups = np.array([3, 3, 3, 3, *[-1] * 12])
        data = images if "negatives.threshold" in settings else [
            {"image": x, "group": int(g)} for x, g in zip(images, groups, strict=True)]  # fmt: skip
        settings |= {} if "negatives.threshold" in settings else {"group_column": "group"}
        settings |= {"method.queue_size": 40, "optimizer.lr": 0.0, "schedule.warmup_epochs": 0}
        built = api.prepare(data, "moco", **TINY, negatives="drop-similar", workers=0, settings=settings)
        for module in built.network.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.0  # the features of an image are the same in both steps
        bank, dropped = built.method.negative_bank(), []
        for step in range(2):
            batch = next(iter(built.loader.epoch(step)))
            dropped.append(built.step(batch, step)["dropped_pairs"])
        assert int(bank.filled) == 32 and len(bank.tags) == 40
        assert dropped == ([0, 16] if "negatives.threshold" in settings else [6, 6 + 16 + 12])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "moco", "pcl"])
@pytest.mark.parametrize("by", ["group", "features"])
def test_resuming_is_bit_exact(
    method: str, by: str, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = TINY | {"epochs": 3, "quiet": True, "negatives": "drop-similar"}
    fields["settings"] = {"group_column": "video", "negatives.by": by}
    fields["settings"] |= {"negatives.threshold": 0.6} if by == "features" else {}
    fields["settings"] |= {f"method.{key}": value for key, value in SMALL[method].items()}
    inbatch.pretrain(videos, method, out=tmp_path / "whole", **fields)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 4)
        inbatch.pretrain(videos, method, out=tmp_path / "cut", **fields)
    inbatch.pretrain(videos, method, out=tmp_path / "cut", resume=True, **fields)
    assert_same_state(saved(tmp_path / "cut"), saved(tmp_path / "whole"))


BAD = {
    "negatives drop-similar does not fit byol: it fits simclr, dcl, hcl, moco, mocov3, nnclr, cc, pcl, supcon": {
        "method": "byol", "negatives": "drop-similar"},
    "negatives hard does not fit byol: it fits simclr, dcl, moco, mocov3, nnclr, cc": {
        "method": "byol", "negatives": "hard"},
    "negatives debias does not fit hcl": {"method": "hcl", "negatives": "debias"},
    "negatives.name = 'harder' is unknown: did you mean 'hard'?": {"negatives": "harder"},
    "negatives hard has no setting 'threshold'": {"negatives": "hard", "settings": {"negatives.threshold": 0.9}},
    "there is no negatives.name": {"settings": {"negatives.threshold": 0.9}},
    "negatives.threshold = 1.5 is a cosine": {"negatives": "drop-similar", "settings": {"negatives.threshold": 1.5}},
    "negatives.threshold = 0.6 is a cosine of features, and near duplicates are those of the groups of video": {
        "negatives": "drop-similar", "settings": {"negatives.threshold": 0.6, "group_column": "video"}},
    "negatives.tau_plus = 1": {"negatives": "debias", "settings": {"negatives.tau_plus": 1.0}},
}  # fmt: skip


def test_invalid_settings_are_refused_before_the_first_step(videos: Path) -> None:
    for message, fields in BAD.items():
        options = dict(fields)
        with pytest.raises(ConfigError) as refused:
            api.prepare(videos, options.pop("method", "simclr"), **TINY, **options)
        assert message in str(refused.value)
    with pytest.raises(DataError, match=r"all 48 images of .* are of one group of one, so that none is a negative"):
        api.prepare(videos, "simclr", **TINY, negatives="drop-similar", settings={"group_column": "one"})
    with pytest.raises(DataError, match=r"has no groups; name their column \(--group-column\)"):
        api.prepare(videos, "simclr", **TINY, negatives="drop-similar", settings={"negatives.by": "group"})
