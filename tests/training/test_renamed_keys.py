"""Old names of settings are errors that give the new name, and the script renames them in files, runs and records."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from inbatch.errors import ConfigError
from inbatch.training.recipe import make
from inbatch.training.registry import PARTS, make_part
from inbatch.training.renamed_keys import RENAMED
from inbatch.training.settings_file import read_settings

SCRIPT = Path(__file__).parents[2] / "scripts" / "migrate_recipes.py"
OLD = """\
# my settings: µ, keep this line
method:
  name: moco   # v2
  queue: 4096
  m: 0.99
schedule: {warmup: 3}
views.area: 0.2
batch: 64
size: 96
command: inbatch pretrain --set size=96 --set method.queue=4096 --set 'k=20' --set encoder.size=3
"""


def options_of(part: str, name: str) -> set[str]:
    required = {"lr": 1.0} if part == "optimizer" else {}
    return {f"{part}.{option}" for option in make_part(part, {"name": name} | required, 32).options}


def test_every_old_name_is_an_error_that_gives_the_new_one():
    for old, new in RENAMED.items():
        part, _, option = old.partition(".")
        names = [name for name in (PARTS.get(part) or ()) if new in options_of(part, name)] if option else []
        for named in [{f"{part}.name": name} for name in names] or [{}]:
            with pytest.raises(ConfigError, match=f"{old!r} is now {new!r}"):
                make({"data": "photos", old: 1} | named)


def test_old_names_are_recognised_in_any_position():
    """For a part without the setting, for a part that is not used, and after another unknown key."""
    for settings, message in (
        (
            {"method.name": "simclr", "method.m": 0.9},
            "'method.m' is now 'method.momentum', which method simclr does not",
        ),
        (
            {"views.name": "digits", "views.area": 0.2},
            "'views.area' is now 'views.min_scale', which views digits does not",
        ),
        ({"attend.hidden": 8}, "'attend.hidden' is now 'attend.hidden_dim': rename it"),
        ({"nonsense": 1, "batch": 64}, "'batch' is now 'batch_size': rename it"),
    ):
        with pytest.raises(ConfigError, match=message):
            make({"data": "photos"} | settings)


def test_every_new_name_is_a_setting():
    known = set(make({"data": "photos"}).flat())
    for part, makers in PARTS.items():
        for name in makers or ():
            known |= options_of(part, name)
    assert set(RENAMED.values()) <= known and not known & set(RENAMED)


def migrate(*words: object) -> int:
    """Return the exit code of the script."""
    arguments, sys.argv = sys.argv, [str(SCRIPT), *map(str, words)]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = arguments
    return 0


def test_script_renames_only_settings(tmp_path: Path):
    run = tmp_path / "run"
    (run / "heads").mkdir(parents=True)
    (tmp_path / "mine.yaml").write_text(OLD, encoding="utf-8")
    recipe = read_settings(yaml.safe_load(OLD)) | {"data": "photos"}
    del recipe["command"]
    with pytest.raises(ConfigError, match="is now"):
        make(recipe)
    (run / "recipe.json").write_text(json.dumps({"method": {"name": "byol", "m": 0.9}, "k": 5, "preset": "none"}))
    (run / "result.json").write_text(json.dumps({"recipe": {"method": {"name": "byol", "m": 0.9}}, "k": 5, "size": 1}))
    (run / "heads" / "config.json").write_text(
        json.dumps({"inbatch": {"method": "byol", "options": {"m": 0.9, "hidden": 8}, "told": {"batch": 4}}})
    )
    paths = tmp_path / "mine.yaml", run
    assert migrate("--check", *paths) == 1 and "  m: 0.99" in (tmp_path / "mine.yaml").read_text("utf-8")
    assert migrate(*paths) == 0
    assert (
        (tmp_path / "mine.yaml").read_text("utf-8")
        == """\
# my settings: µ, keep this line
method:
  name: moco   # v2
  queue_size: 4096
  momentum: 0.99
schedule: {warmup_epochs: 3}
views.min_scale: 0.2
batch_size: 64
image_size: 96
command: inbatch pretrain --set image_size=96 --set method.queue_size=4096 --set 'knn_k=20' --set encoder.size=3
"""
    )
    settings = read_settings(yaml.safe_load((tmp_path / "mine.yaml").read_text("utf-8"))) | {"data": "photos"}
    del settings["command"]
    assert make(settings).method.options["momentum"] == 0.99
    assert json.loads((run / "recipe.json").read_text()) == {
        "method": {"name": "byol", "momentum": 0.9}, "knn_k": 5, "preset": "none",
    }  # fmt: skip
    assert json.loads((run / "result.json").read_text()) == {
        "recipe": {"method": {"name": "byol", "momentum": 0.9}}, "k": 5, "size": 1,
    }  # fmt: skip
    assert json.loads((run / "heads" / "config.json").read_text())["inbatch"] == {
        "method": "byol", "options": {"momentum": 0.9, "hidden_dim": 8}, "told": {"batch": 4},
    }  # fmt: skip
    assert migrate("--check", *paths) == 0


def test_the_script_leaves_what_it_must_not_change(tmp_path: Path):
    untouched = {
        "bench.json": '{"method": "simclr", "encoder": "resnet18", "size": 32, "batch": 64, "note": "k=20 is usual"}',
        "own.yaml": "recipe: {method: {name: mine, m: 3, queue: 4}, data: x}",
    }
    for name, text in untouched.items():
        (tmp_path / name).write_text(text)
    assert migrate(tmp_path) == 0
    assert {name: (tmp_path / name).read_text() for name in untouched} == untouched

    file = tmp_path / "crlf.yaml"
    file.write_bytes("\ufeffmethod: moco\r\nbatch: 4\r\n".encode())
    file.chmod(0o600)
    assert migrate(file) == 0
    assert file.read_bytes() == "\ufeffmethod: moco\r\nbatch_size: 4\r\n".encode()
    assert file.stat().st_mode & 0o777 == 0o600

    file.write_text("batch: 4\nbatch_size: 8\n")
    (tmp_path / "bad.yaml").write_text("batch: [")
    (tmp_path / "odd.yaml").write_text("? [a]\n: 1\nbatch: 4\n")
    assert migrate(file, tmp_path / "bad.yaml", tmp_path / "odd.yaml") == 2, "two problems; the third is rewritten"
    assert (tmp_path / "odd.yaml").read_text() == "? [a]\n: 1\nbatch_size: 4\n"
