"""A checkpoint knows the recipe that it was computed with."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import leave_out_evaluation, stop_after, tiny, use_few_images

import inbatch
from inbatch.errors import ConfigError, InbatchError, Preempted
from inbatch.training import checkpoint
from inbatch.training.checkpoint_recipe import EARLIER, check_recipe, notes_on_version, run_facts
from inbatch.training.recipe import Recipe, make
from inbatch.training.renamed_keys import RENAMED
from inbatch.training.resume import _with_context

pytestmark = pytest.mark.usefixtures("narrow")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a run of ten steps that was stopped after the third."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_few_images(patch)
        leave_out_evaluation(patch)
        with patch.context() as at, pytest.raises(Preempted):
            stop_after(at, 3)
            tiny("moco", out)
    yield out


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def edited(run: Path, **changes: Any) -> None:
    recipe = json.loads((run / "recipe.json").read_text())
    for key, value in changes.items():
        recipe[key] = recipe[key] | value if isinstance(value, dict) else value
    (run / "recipe.json").write_text(json.dumps(recipe))


def rewritten(run: Path, at: int, **entries: Any) -> None:
    """Save the checkpoint of a run again with other entries of its training state, and a valid checksum."""
    loaded = checkpoint.load(run / "checkpoints")
    loaded.state["progress"] |= entries
    checkpoint.save(run / "checkpoints", loaded.state, step=at, run=loaded.run)


def test_an_edited_recipe_is_refused_with_the_keys(copy: Path) -> None:
    kept = (copy / "recipe.json").read_text()
    for changes, words in (
        ({"optimizer": {"weight_decay": 0.5}}, r"optimizer\.weight_decay = 0\.5 \(the checkpoint has 0\.0001\)"),
        ({"epochs": 3}, r"epochs = 3 \(the checkpoint has 2\)"),
        ({"seed": 7, "method": {"temperature": 0.9}}, r"method\.temperature = 0\.9 .*seed = 7 "),
        ({"method": {"name": "simclr"}}, r"method\.name = 'simclr'"),
        ({"context": 16}, r"context = 16 \(the checkpoint has 8\)"),
        ({"replans": [[2, 5]]}, r"replans = \[\[2, 5\]\] \(the checkpoint has \[\]\)"),
    ):
        if changes.get("method", {}).get("name"):
            recipe = json.loads(kept) | {"method": changes["method"]}
            (copy / "recipe.json").write_text(json.dumps(recipe))
        else:
            edited(copy, **changes)
        before = (copy / "run.json").read_bytes()
        for use in (
            lambda: inbatch.pretrain(resume=copy, quiet=True),
            lambda: inbatch.load(copy),
            lambda: inbatch.inspect_run(copy, count=1),
        ):
            with pytest.raises(ConfigError, match=rf"recipe\.json was edited after .*last\.pt was saved.*: .*{words}"):
                use()
        assert (copy / "run.json").read_bytes() == before
        (copy / "recipe.json").write_text(kept)


def recipe_with(**settings: Any) -> Recipe:
    return make({"data": "photos", "method.name": "simclr", "image_size": 32} | settings)


def stored(recipe: Recipe, step: int) -> checkpoint.Checkpoint:
    return checkpoint.Checkpoint({}, step, Path("last.pt"), None, run_facts(recipe, 8, 1))


def test_changes_that_a_resume_may_make_are_accepted() -> None:
    recipe, file = recipe_with(), Path("recipe.json")
    check_recipe(stored(recipe, 5), replace(recipe, data="/elsewhere/photos"), file)
    # The context follows from the number of ranks, and a resumed run keeps it.
    check_recipe(stored(recipe, 5), replace(recipe, context=8), file)
    check_recipe(stored(replace(recipe, context=8), 5), recipe, file)
    # A budget changes the length after the checkpoint, or repeats such a change.
    early, late = ((2, 9),), ((2, 9), (5, 3))
    check_recipe(stored(replace(recipe, replans=early), 5), replace(recipe, replans=late), file)
    check_recipe(stored(replace(recipe, replans=late), 5), replace(recipe, replans=early), file)
    with pytest.raises(ConfigError, match="replans"):
        check_recipe(stored(replace(recipe, replans=late), 6), replace(recipe, replans=early), file)
    check_recipe(checkpoint.Checkpoint({}, 5, Path("last.pt"), None), replace(recipe, seed=3), file)  # no recipe


def test_a_checkpoint_with_old_names_is_compared_by_the_new_ones() -> None:
    recipe = recipe_with(batch_size=64, knn_k=7)
    old = {new: name for name, new in RENAMED.items()}
    nested = {old.get(key, key): value for key, value in recipe.nested().items()}
    saved_then = replace(stored(recipe, 5), run=run_facts(recipe, 8, 1) | {"recipe": nested})
    check_recipe(saved_then, recipe, Path("recipe.json"))
    with pytest.raises(ConfigError, match="knn_k = 8"):
        check_recipe(saved_then, replace(recipe, knn_k=8), Path("recipe.json"))
    assert notes_on_version(saved_then, recipe) == []


def test_settings_that_the_version_of_a_checkpoint_did_not_have_are_named() -> None:
    recipe = recipe_with()
    nested = recipe.nested()
    del nested["method"]["temperature"], nested["max_unreadable"]
    (note,) = notes_on_version(replace(stored(recipe, 5), run=run_facts(recipe, 8, 1) | {"recipe": nested}), recipe)
    assert "without method.temperature = " in note and "max_unreadable = 0.01: the run continues with" in note


@pytest.mark.usefixtures("brief")
def test_a_checkpoint_of_an_earlier_version_resumes_with_a_sentence(
    copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = checkpoint.load(copy / "checkpoints")
    checkpoint.save(copy / "checkpoints", loaded.state, step=loaded.step)
    assert checkpoint.load(copy / "checkpoints").run == {}
    inbatch.pretrain(resume=copy)
    assert capfd.readouterr().err.count(EARLIER) == 1
    assert checkpoint.load(copy / "checkpoints").run["recipe"]["method"]["name"] == "moco"


def test_steps_outside_the_run_are_refused(copy: Path) -> None:
    for step, entries, words in (
        (11, {"step": 11}, r"step 11, progress\.step 11 .* in a run of 10 steps"),
        (3, {"step": 4}, r"step 3, progress\.step 4"),
        (3, {"ended": 2}, r"progress\.ended 2 epochs"),
        (3, {"step": -3}, r"'progress': step is -3"),
    ):
        rewritten(copy, step, **({"step": 3, "ended": 0} | entries))
        with pytest.raises(InbatchError, match=words):
            inbatch.pretrain(resume=copy, quiet=True)
    checkpoint.save(copy / "checkpoints", {}, step=-1)
    checkpoint.save(copy / "checkpoints", {}, step=-1)
    with pytest.raises(InbatchError, match=r"last\.pt is not a checkpoint of a run: its step is -1"):
        inbatch.pretrain(resume=copy, quiet=True)


def test_an_emptied_optimiser_is_refused(copy: Path) -> None:
    loaded = checkpoint.load(copy / "checkpoints")
    loaded.state["optimizer"]["state"] = {}
    checkpoint.save(copy / "checkpoints", loaded.state, step=loaded.step, run=loaded.run)
    with pytest.raises(InbatchError, match=r"in 'optimizer': state\.0 \(encoder\..*\) is missing") as caught:
        inbatch.pretrain(resume=copy, quiet=True)
    assert caught.value.exit_code == 1


def test_more_epochs_are_refused_with_the_remedy(copy: Path) -> None:
    with pytest.raises(ConfigError, match=rf"epochs = 5 \(the run has 2\).*--init {copy} instead of --resume"):
        inbatch.pretrain(resume=copy, epochs=5, quiet=True)
    (copy / "encoder").mkdir()
    (copy / "encoder" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=rf"--init {copy / 'encoder'} instead of --resume"):
        inbatch.pretrain(resume=copy, epochs=5, quiet=True)
    with pytest.raises(ConfigError, match="seed = 5") as caught:
        inbatch.pretrain(resume=copy, seed=5, quiet=True)
    assert "--init" not in str(caught.value)


def test_a_context_that_follows_from_the_ranks_is_that_of_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_with(batch_size=64)  # its context is the share of a rank
    assert _with_context(Path("run"), recipe, {"context": 64, "world": 1}).context is None
    for world in (2, 1):  # two ranks, then one, then one again: the second resume knows one rank only
        assert _with_context(Path("run"), recipe, {"context": 32, "world": world}).context == 32
    assert _with_context(Path("run"), recipe, {}).context is None, "a run of an earlier version without run.json"
    monkeypatch.setattr("inbatch.runtime.distributed.world", lambda: 2)
    with pytest.raises(ConfigError, match="context groups of 64, which 2 ranks cannot form: resume with 1 rank"):
        _with_context(Path("run"), recipe, {"context": 64, "world": 1})
    with pytest.raises(ConfigError, match="context groups of 64, which 2 ranks cannot form: resume with 1 rank"):
        _with_context(Path("run"), recipe_with(batch_size=64, context=64), {"context": 64, "world": 1})
    monkeypatch.setattr("inbatch.runtime.distributed.world", lambda: 3)
    with pytest.raises(ConfigError, match="batches of 64, which 3 ranks cannot share: resume with 4 ranks, as before"):
        _with_context(Path("run"), recipe, {"context": 16, "world": 4})
