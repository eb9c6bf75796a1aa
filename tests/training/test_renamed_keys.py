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


def test_every_old_name_is_an_error_that_gives_the_new_one():
    for old, new in RENAMED.items():
        part, _, option = old.partition(".")
        settings = {"data": "photos", old: 1}
        if option and part in PARTS:
            settings[f"{part}.name"] = {"method": "moco", "views": "simclr", "attend": "batchformer"}[part]
        with pytest.raises(ConfigError, match=f"{old!r} is now {new!r}"):
            make(settings)


def test_every_new_name_is_a_setting():
    known = set(make({"data": "photos"}).flat())
    for part, makers in PARTS.items():
        for name in makers or ():
            options = {"name": name, "lr": 1.0} if part == "optimizer" else {"name": name}
            known |= {f"{part}.{option}" for option in make_part(part, options, 32).options}
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


def test_the_script_renames_settings_and_nothing_else(tmp_path: Path):
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
    assert migrate("--check", tmp_path) == 1 and "  m: 0.99" in (tmp_path / "mine.yaml").read_text("utf-8")
    assert migrate(tmp_path) == 0
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
    assert migrate("--check", tmp_path) == 0
    (tmp_path / "bad.yaml").write_text("a: [")
    assert migrate(tmp_path / "bad.yaml") == 2
