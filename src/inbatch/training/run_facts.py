"""Facts on a run for the model card of its encoder: no paths, no names of files, classes or machines."""

from pathlib import Path
from typing import Any

from inbatch.errors import InbatchError, many
from inbatch.runtime.files import object_in, read_json

_SETTINGS = ("preset", "image_size", "channels", "batch_size", "context", "epochs", "precision", "seed")
_FIGURES = {
    ("knn", "top1"): "k-NN, top-1 accuracy", ("linear", "top1"): "linear probe, top-1 accuracy",
    ("clustering", "acc"): "k-means, clustering accuracy", ("clustering", "nmi"): "k-means, NMI",
}  # fmt: skip


def run_facts(run: Path) -> dict[str, Any]:
    """Return "data", "recipe" and "figures" of a run, as far as its files state them; empty for an encoder's folder.

    Data sets of a library are named. Of own images, only the number is stated: a path may name a person.
    """
    recipe, result = _read(run / "recipe.json"), _read(run / "result.json")
    if not recipe:
        return {}
    facts: dict[str, Any] = {"recipe": _settings(recipe, run / "recipe.json")}
    images = result.get("images")
    count = many(images, "image") if isinstance(images, int) else "images"
    data = str(recipe.get("data"))
    known = data == "digits-canvas" or data.startswith("torchvision/")
    facts["data"] = f"{data} ({count})" if known else f"{count} of the user's own collection"
    trained, untrained = (object_in(result, key, run / "result.json") for key in ("evaluation", "untrained"))
    rows = [
        [name, *(_figure(part, protocol, key) for part in (trained, untrained))]
        for (protocol, key), name in _FIGURES.items()
        if isinstance(trained.get(protocol), dict)
    ]
    if rows:
        facts["figures"] = rows
    return facts


def _settings(recipe: dict[str, Any], file: Path) -> dict[str, Any]:
    named = {f"{key}.name": object_in(recipe, key, file).get("name") for key in ("method", "encoder", "views")}
    optimizer = object_in(recipe, "optimizer", file)
    named |= {"optimizer.name": optimizer.get("name"), "optimizer.lr": optimizer.get("lr")}
    parts = ("fuse", "attend", "curate", "negatives", "mix", "sampler")
    plugins = {key: object_in(recipe, key, file).get("name") for key in parts}
    every = named | {key: recipe.get(key) for key in _SETTINGS} | plugins
    return {key: value for key, value in every.items() if value is not None}


def _figure(evaluation: dict[str, Any], protocol: str, key: str) -> str:
    figures = evaluation.get(protocol)
    value = figures.get(key) if isinstance(figures, dict) else None
    return f"{value:.3f}" if isinstance(value, float) else "not measured"


def _read(file: Path) -> dict[str, Any]:
    """Return a JSON file of a run; empty if it does not exist or is damaged: the encoder is exported all the same."""
    try:
        return read_json(file) if file.is_file() else {}
    except InbatchError:
        return {}
