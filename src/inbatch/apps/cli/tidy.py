"""Commands that tidy a collection of images: duplicates, outliers."""

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from inbatch.apps.cli.app import (
    Data,
    Device,
    Features,
    ImageColumn,
    Images,
    Index,
    Json,
    LabelColumn,
    Split,
    app,
    emit_result,
    report_errors,
)
from inbatch.apps.cli.own_code import OwnEncoder
from inbatch.apps.console import print_table, say, warn
from inbatch.errors import ConfigError
from inbatch.runtime.path_list import joined_paths

Keep = Annotated[Path | None, Option("--write", metavar="KEEP.csv", help="List of the other images, for --data.")]


@app.command(
    epilog="Examples:\n\n  inbatch duplicates ~/photos\n\n"
    "  inbatch duplicates ~/photos --run runs/simclr-photos-1 --picture pairs.png\n\n"
    "  inbatch duplicates ~/photos --write keep.csv\n\n  inbatch pretrain --data keep.csv",
)
def duplicates(
    data: Data,
    run: Annotated[Path | None, Option(help="Run or encoder's folder; its features give candidates.")] = None,
    features: Annotated[Path | None, Option(help="File of inbatch embed; its features give candidates.")] = None,
    threshold: Annotated[
        float | None, Option(help="Smallest pixel check of a near duplicate, above -1, at most 1; default 0.9.")
    ] = None,
    candidates: Annotated[
        str | None,
        Option(metavar="thumbnails|features|both", help="Source of the candidates; default: all that are available."),
    ] = None,
    neighbours: Annotated[int, Option("-k", "--neighbours", min=1, help="Candidates per image and search.")] = 5,
    index: Index = "exact",
    split: Split = None,
    write: Keep = None,
    picture: Annotated[
        Path | None, Option(help="Picture of the pairs around the threshold, with their values.")
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    device: Device = "auto",
    encoder: OwnEncoder = None,
    as_json: Json = False,
) -> None:
    """List identical and nearly identical images, those in different splits first. Deletes nothing."""
    with report_errors(as_json):
        if run is not None and features is not None:
            raise ConfigError("--run and --features both name features: give one of them")
        from inbatch.apps.collection.duplicates import find_duplicates
        from inbatch.apps.collection.tidy_text import duplicate_lines, duplicate_rows

        columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}

        def find() -> dict[str, Any]:
            return find_duplicates(
                joined_paths(data), run or features, candidates=candidates, threshold=threshold,
                neighbours=neighbours, index=index, split=split, write=write, picture=picture, **columns,
                device=device, quiet=False,
            )  # fmt: skip

        def show(result: dict[str, Any]) -> None:
            print_table(("keep", "duplicate", "splits", "check"), duplicate_rows(result))
            say("", *duplicate_lines(result))
            _warn(result)

        emit_result(find, as_json, show)


@app.command(
    epilog="Examples:\n\n  inbatch outliers runs/simclr-photos-1\n\n"
    "  inbatch outliers runs/simclr-photos-1 -n 100 --picture outliers.png\n\n"
    "  inbatch outliers features.npz ~/photos --write keep.csv",
)
def outliers(
    features: Features,
    data: Images = None,
    count: Annotated[int, Option("-n", "--count", min=1, help="Number of outliers to list.")] = 50,
    order: Annotated[str, Option(metavar="distribution|distance|density", help="Order of the list.")] = "distribution",
    neighbours: Annotated[int, Option("-k", "--neighbours", min=1, help="Number of neighbours.")] = 20,
    index: Index = "exact",
    split: Split = None,
    write: Keep = None,
    picture: Annotated[Path | None, Option(help="Picture of the listed images, broken-looking ones first.")] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    device: Device = "auto",
    encoder: OwnEncoder = None,
    as_json: Json = False,
) -> None:
    """List the images that are least like the others, and those that look broken. Deletes nothing."""
    with report_errors(as_json):
        from inbatch.apps.collection.outliers import find_outliers
        from inbatch.apps.collection.tidy_text import outlier_lines, outlier_rows

        columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}

        def find() -> dict[str, Any]:
            return find_outliers(
                features, joined_paths(data) or None, count=count, order=order, neighbours=neighbours, index=index,
                split=split, write=write, picture=picture, **columns, device=device, quiet=False,
            )  # fmt: skip

        def show(result: dict[str, Any]) -> None:
            print_table(("image", "why", "distribution", "distance", "density"), outlier_rows(result))
            say("", *outlier_lines(result))
            _warn(result)

        emit_result(find, as_json, show)


def _warn(result: dict[str, Any]) -> None:
    """Print the notes, such as that the features are those of an unfinished run."""
    for text in result["notes"]:
        warn(text)
