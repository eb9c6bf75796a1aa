"""Recipes: every value survives the recipe's file and command line."""

import shlex
from typing import Any

import pytest

from inbatch.errors import ConfigError
from inbatch.training.recipe import make
from inbatch.training.resolve import resolve_recipe
from inbatch.training.settings_file import parse_assignment, read_file


def parsed(command: str) -> dict[str, Any]:
    """Return the settings of a command line."""
    words = shlex.split(command)
    settings = {"method.name": words[2]}
    for flag, value in zip(words[3::2], words[4::2], strict=True):
        settings |= parse_assignment(value) if flag == "--set" else {flag.removeprefix("--"): value}
    return settings


@pytest.mark.parametrize(
    "settings",
    [
        {"data": "my photos"},
        {"data": "photos", "image_size": 32, "epochs": 7, "subset": 100, "evaluate_every": 3},
        {"data": "photos", "image_size": 128, "channels": 1, "views.name": "digits"},
        {
            "data": "photos",
            "image_size": 32,
            "optimizer.name": "adamw",
            "optimizer.lr": 1.0,
            "optimizer.weight_decay": 1e-4,
        },
        {"data": "photos", "method.name": "moco", "preset": "v1", "schedule.milestones": [0.5, 0.7], "test": "t=1 x"},
        {
            "data": "photos",
            "method.name": "moco",
            "image_size": 64,
            "views.name": "mocov2",
            "views.blur": 0.1,
            "batch_size": 64,
        },
        {
            "data": "digits-canvas",
            "image_size": 20,
            "channels": 1,
            "method.name": "supcon",
            "context": 8,
            "cache_on_device": False,
        },
        {"data": "photos", "encoder.name": "vit_tiny_patch16_224", "encoder.init": "w.pt", "precision": "float32"},
    ],
)
def test_a_recipe_survives_its_file_and_its_command(settings: dict[str, Any]) -> None:
    recipe = make(settings)
    assert make(recipe.flat()) == recipe
    assert make(parsed(recipe.command())) == recipe, recipe.command()


def test_code_in_a_recipe_is_refused(tmp_path):
    """Fault 4: a YAML tag that would make Python run code."""
    file, sentinel = tmp_path / "recipe.yaml", tmp_path / "executed"
    file.write_text(f"epochs: !!python/object/apply:os.system ['touch {sentinel}']\n")
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        read_file(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_assignment(f"epochs=!!python/object/apply:os.system ['touch {sentinel}']")
    assert not sentinel.exists()


def test_a_text_that_is_not_yaml_is_set_in_quotes() -> None:
    with pytest.raises(ConfigError, match="""quotes that the shell keeps: --set 'KEY="TEXT"'"""):
        parse_assignment("data=[a")
    assert parse_assignment('data="[a"') == {"data": "[a"}


def test_options_of_methods_outside_their_limits_are_refused() -> None:
    """With these, the loss was nan, or a centre grew without limit."""
    for method, key, value in (("vicreg", "eps", -1), ("dino", "center_momentum", 2), ("dino", "center_momentum", -1)):
        with pytest.raises(ConfigError, match=rf"^method.{key} = {value}: input should be (greater|less) than"):
            make({"data": "photos", "method.name": method, f"method.{key}": value})


def test_true_and_false_are_no_numbers() -> None:
    """Pydantic takes them as 1 and 0: channels=true read all images in grey."""
    for key in ("epochs", "knn_k", "variance_weight", "schedule.warmup_epochs", "method.temperature", "optimizer.lr"):
        with pytest.raises(ConfigError, match=rf"^{key} = True: input should be a number"):
            make({"data": "photos", "method.name": "simclr", "optimizer.name": "lars", key: True})
    for key in ("channels", "subset"):
        with pytest.raises(ConfigError, match=rf"^{key} = True: input should be a whole number"):
            resolve_recipe("digits-canvas", {key: True})
    assert make({"data": "photos", "compile": True}).compile is True


def test_an_invalid_image_size_is_named_as_the_user_wrote_it() -> None:
    for value in ("abc", 33.5, 0, 10**9):
        with pytest.raises(ConfigError, match=r"^image_size = "):
            make({"data": "photos", "image_size": value})
    assert make({"data": "photos", "image_size": "48"}).views.options["size"] == 48


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.lr", -1),
        ("optimizer.weight_decay", -0.1),
        ("optimizer.vector_lr", -0.1),
        ("schedule.milestones", [90, 150]),
        ("schedule.milestones", [0.0, 0.5]),
    ],
)
def test_rates_below_0_and_milestones_in_epochs_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = .*input should be (greater|less) than"):
        make({"data": "photos", "optimizer.name": "lars", "optimizer.lr": 1.0, key: value})
