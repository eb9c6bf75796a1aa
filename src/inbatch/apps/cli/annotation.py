"""Commands for labels: select (what to label next) and labels (what is probably labelled wrongly)."""

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from inbatch.apps.cli.app import (
    SEEDS,
    Device,
    Features,
    ImageColumn,
    Images,
    Json,
    LabelColumn,
    Split,
    app,
    emit_result,
    report_errors,
)
from inbatch.apps.cli.own_code import OwnEncoder
from inbatch.apps.console import print_table, say, warn
from inbatch.errors import many
from inbatch.runtime.path_list import joined_paths

_SHOWN = 20
"""Rows of a table in the terminal."""


@app.command(
    epilog="Examples:\n\n  inbatch select runs/simclr-photos-1 -n 500 --write chosen.csv --picture chosen.png\n\n"
    "  inbatch select features.npz ~/photos -n 100 --labelled done.csv --write next.csv\n\n"
    "  inbatch select runs/simclr-photos-1 ~/photos --strategy uncertain --labelled done.csv",
)
def select(
    features: Features,
    data: Images = None,
    count: Annotated[int, Option("-n", "--count", min=1, help="Number of images to choose.")] = 100,
    strategy: Annotated[
        str | None, Option(metavar="NAME", help="coverage (default), typical, diverse, uncertain or random.")
    ] = None,
    labelled: Annotated[
        str | None,
        Option(metavar="FILE|data|none", help="Labelled images: a list, features, or the labels of the data."),
    ] = None,
    split: Split = None,
    write: Annotated[Path | None, Option("--write", metavar="CHOSEN.csv", help="List for --data.")] = None,
    picture: Annotated[Path | None, Option(help="Picture of the first 100.")] = None,
    seed: Annotated[int, Option(min=0, max=SEEDS, help="Seed of draws and of k-means.")] = 0,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    device: Device = "auto",
    encoder: OwnEncoder = None,
    as_json: Json = False,
) -> None:
    """Choose the images to label next by their features; labelled images count as chosen."""
    with report_errors(as_json):
        from inbatch.apps.collection.select import select_images
        from inbatch.evaluation.selection import DEFAULT

        def choose() -> dict[str, Any]:
            return select_images(
                features, joined_paths(data) or None, count=count, strategy=strategy or DEFAULT, labelled=labelled,
                split=split, write=write, picture=picture, seed=seed, device=device, quiet=False,
                image_column=image_column, label_column=label_column,
            )  # fmt: skip

        def show(result: dict[str, Any]) -> None:
            rows = [
                (str(one["rank"]), one["path"], one["split"], one["class"] or "", one["reason"])
                for one in result["chosen"][:_SHOWN]
            ]
            print_table(("rank", "image", "split", "class", "reason"), rows)
            _print_rest(len(result["chosen"]), "image", result)
            known = f", {result['labelled']:,} of them labelled" if result["labelled"] else ""
            say("", f"Chosen:     {count:,} of {many(result['images'], 'image')}{known} ({result['strategy']})")
            _print_files(result)

        emit_result(choose, as_json, show)


@app.command(
    epilog="Examples:\n\n  inbatch labels runs/simclr-photos-1 ~/photos --picture suspects.png\n\n"
    "  inbatch labels features.npz -n 50\n\n"
    "  inbatch labels features.npz ~/photos --write suspects.csv",
)
def labels(
    features: Features,
    data: Images = None,
    count: Annotated[
        int | None, Option("-n", "--count", min=1, help="Maximum number of suspects; default: all.")
    ] = None,
    folds: Annotated[int, Option(min=2, help="Parts of the cross-validation.")] = 5,
    neighbours: Annotated[int, Option("-k", "--neighbours", min=1, help="Neighbours of each image.")] = 30,
    split: Split = None,
    write: Annotated[Path | None, Option("--write", metavar="SUSPECTS.csv", help="List of the suspects.")] = None,
    picture: Annotated[Path | None, Option(help="Picture of the first 60, each with a similar image.")] = None,
    seed: Annotated[int, Option(min=0, max=SEEDS, help="Seed of the folds.")] = 0,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    device: Device = "auto",
    encoder: OwnEncoder = None,
    as_json: Json = False,
) -> None:
    """Find labels that are probably wrong: a probe on the other images and the neighbours both prefer another class."""
    with report_errors(as_json):
        from inbatch.apps.collection.labels import find_label_errors

        def find() -> dict[str, Any]:
            return find_label_errors(
                features, joined_paths(data) or None, count=count, folds=folds, neighbours=neighbours,
                split=split, write=write,
                picture=picture, seed=seed, device=device, quiet=False, image_column=image_column,
                label_column=label_column,
            )  # fmt: skip

        def show(result: dict[str, Any]) -> None:
            rows = [_suspect(one) for one in result["suspects"][:_SHOWN]]
            print_table(("image", "label", "suggested", "probe", "neighbours", "margin"), rows)
            _print_rest(len(result["suspects"]), "suspect", result)
            share = f"{result['suspected'] / result['checked']:.1%}"
            say("", f"Suspected:  {result['suspected']:,} of {many(result['checked'], 'label')} ({share})")
            say(f"Agreement:  the other images predict {result['agreement']:.1%} of the labels")
            _print_files(result)

        emit_result(find, as_json, show)


def _suspect(one: dict[str, Any]) -> tuple[str, ...]:
    """Return a row of the table."""
    predictions = _percent(one["probe"]), _percent(one["neighbours"])
    return one["path"], one["class"], one["suggested"], *predictions, f"{one['margin']:.2f}"


def _percent(pair: dict[str, float]) -> str:
    """Return the probabilities of label and suggestion as text."""
    return f"{pair['label']:.0%} -> {pair['suggested']:.0%}"


def _print_rest(count: int, noun: str, result: dict[str, Any]) -> None:
    if count > _SHOWN:
        rest = "--write lists" if not result["written"] else f"{result['written']} lists"
        say(f"and {many(count - _SHOWN, noun)} more ({rest} all, --json prints all)")


def _print_files(result: dict[str, Any]) -> None:
    """Print what was written, and the notes."""
    say(*(f"{name}: {' ' * (10 - len(name))}{result[key]}" for name, key in _FILES if result[key]))
    for note in result["notes"]:
        warn(note)


_FILES = (("List", "written"), ("Picture", "picture"))
