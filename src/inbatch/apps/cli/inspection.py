"""Commands for inspection: views, data, inspect, replay, crops, methods, plugins."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from inbatch.apps.cli.app import (
    SEEDS,
    Data,
    Device,
    ImageColumn,
    Json,
    LabelColumn,
    Set,
    app,
    assignments,
    default_output,
    emit_result,
    report_errors,
    requested_output,
)
from inbatch.apps.cli.output import print_replay
from inbatch.apps.cli.own_code import OwnEncoder, OwnMethod, OwnOptimizer, OwnViews, typed
from inbatch.apps.cli.part_output import (
    explain_method,
    explain_methods,
    explain_plugins,
    print_method,
    print_methods,
    print_plugin,
    print_plugins,
)
from inbatch.apps.console import print_error, print_json, print_table, say, warn
from inbatch.errors import ConfigError, DataError, TrainingError
from inbatch.runtime.path_list import joined_paths
from inbatch.runtime.paths import path_of


@app.command(
    epilog="Examples:\n\n  inbatch views ~/photos -o views.png\n\n"
    "  inbatch views ~/photos --views swav --size 224\n\n"
    "  inbatch views ~/photos --views simclr --crops adjacent\n\n"
    "  inbatch views digits-canvas --count 16 --set views.strength=0.5",
)
def views(
    data: Data,
    out: Annotated[Path, Option("--out", "-o", help="Output image; replaced if it exists.")] = Path("views.png"),
    views: Annotated[
        str | None, Option(help="simclr, mocov2, ..., or MODULE:NAME; those for the images' size by default.")
    ] = None,
    preset: Annotated[str | None, Option(help="Use the views of this preset of the method.")] = None,
    crops: Annotated[str | None, Option(help="Geometry of the two views' crops; see inbatch crops.")] = None,
    method: Annotated[str | None, Option(help="Method whose presets are used; default simclr.")] = None,
    size: Annotated[int | None, Option("--image-size", "--size", min=1, help="Side of the views in pixels.")] = None,
    count: Annotated[int, Option(min=1, help="Number of images.")] = 8,
    seed: Annotated[int, Option(min=0, max=SEEDS, help="Seed of the choice of images, and of the views.")] = 0,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Draw images next to the views that a method would learn from, to check augmentations before training."""
    with report_errors(as_json):
        from inbatch.apps.reports.view_grid import draw_views

        fields = {"views": typed("views", views), "preset": preset, "crops": crops, "image_size": size}
        fields |= {"image_column": image_column, "label_column": label_column}
        chosen = {key: value for key, value in fields.items() if value is not None}
        part = draw_views(joined_paths(data), out, method, count=count, seed=seed, settings=assignments(set_), **chosen)
        if as_json:
            print_json({"out": str(out), "views": part.name, "options": part.options})
        else:
            options = ", ".join(f"{key} {value}" for key, value in part.options.items())
            say(f"{out}: every image with its crops, then its views ({part.name}: {options})")


@app.command(
    epilog="Examples:\n\n  inbatch data ~/photos\n\n"
    "  inbatch data ~/photos --sample 2000 -o samples.png\n\n"
    "  inbatch data scans --set channels=1 --json > scans.json",
)
def data(
    data: Data,
    split: Annotated[str | None, Option(help="train, val or test, if the data has them; default: the first.")] = None,
    sample: Annotated[int | None, Option(min=1, help="Number of images to check, evenly spaced; default: all.")] = None,
    out: Annotated[Path | None, Option("--out", "-o", help="Also draw some images, one row per class.")] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    set_: Set = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check every image before training: classes, sizes, duplicates, leaks, damage; exit with 3 if no run can start."""
    with report_errors(as_json):
        from inbatch.apps.reports import dataset_text
        from inbatch.apps.reports.dataset import survey_data

        problems: list[str] = []
        columns = {"image_column": image_column, "label_column": label_column}
        settings = {key: value for key, value in columns.items() if value is not None} | assignments(set_)

        def survey() -> dict[str, Any]:
            result = survey_data(
                joined_paths(data), split=split, sample=sample, out=out, settings=settings, device=device, quiet=False
            )
            problems.extend(result["problems"])
            return result

        def show(result: dict[str, Any]) -> None:
            say(*result["report"].split("\n"), "")
            print_table(("", "found"), list(dataset_text.report_rows(result)))
            say("", *dataset_text.notes(result))
            say(*(["", "Next:", "", *(f"  {line}" for line in result["next"])] if result["next"] else []))

        emit_result(survey, as_json, show)
    if problems:
        for problem in problems:
            print_error(problem)
        raise typer.Exit(DataError.exit_code)


@app.command(
    epilog="Examples:\n\n  inbatch inspect runs/simclr-photos-1\n\n"
    "  inbatch inspect runs/simclr-photos-1 -o pictures --count 16 --seed 1",
)
def inspect(
    run: Annotated[Path, Argument(metavar="RUN", help="Run directory, finished or stopped.")],
    data: Annotated[list[str] | None, Option(help="Current path of its images; default: as in its recipe.")] = None,
    out: Annotated[Path | None, Option("--out", "-o", help="Folder of the pictures; default RUN/inspect.")] = None,
    count: Annotated[int, Option(min=1, help="Images per picture.")] = 8,
    seed: Annotated[int, Option(min=0, max=SEEDS, help="Seed of the choice of images, and of the views.")] = 0,
    device: Device = "auto",
    encoder: OwnEncoder = None,
    as_json: Json = False,
) -> None:
    """Draw and measure the effect of a run's plug-ins on a batch (fusion, curation, attention), without training."""
    with report_errors(as_json):
        from inbatch.apps.reports.batch_context import inspect_run
        from inbatch.apps.reports.batch_context_text import report_rows

        if out is None:
            pictures = path_of(run, "RUN") / "inspect"
            default_output(pictures / "views.png" if pictures.is_dir() else pictures)
        else:
            requested_output(out / "views.png")
        where = joined_paths(data) or None

        def show(result: dict[str, Any]) -> None:
            print_table(("plug-in", "measured", "found"), report_rows(result))
            say("", *(f"Data:      {line}" for line in result["data"].split("\n")))
            say(f"Run:       {run}, step {result['step']:,}, a batch of epoch {result['epoch'] + 1}")
            if result["note"]:
                say(f"Note:      {result['note']}")
            for picture in result["pictures"]:
                say(f"Picture:   {picture}")

        emit_result(lambda: inspect_run(run, where, out=out, count=count, seed=seed, device=device), as_json, show)


@app.command(
    epilog="Examples:\n\n  inbatch replay runs/simclr-photos-1\n\n  inbatch replay runs/simclr-photos-1 --json",
)
def replay(
    run: Annotated[Path, Argument(metavar="RUN", help="Run directory of a run that ended with a non-finite number.")],
    device: Device = "auto",
    encoder: OwnEncoder = None,
    method: OwnMethod = None,
    optimizer: OwnOptimizer = None,
    views: OwnViews = None,
    as_json: Json = False,
) -> None:
    """Repeat the step with a non-finite loss or gradient and report where it began. Exits with 4 if it is finite."""
    with report_errors(as_json):
        from inbatch.api import replay_run

        result = replay_run(run, device=device)
        if as_json:
            print_json(result)
        else:
            print_replay(result)
        if not result["reproduced"]:
            raise typer.Exit(TrainingError.exit_code)


@app.command(
    epilog="Examples:\n\n  inbatch crops -o crops.png\n\n"
    "  inbatch crops --crops all --size 224 --pairs 100000\n\n"
    "  inbatch crops --sampler torchvision --size 375x500 --pairs 20000",
)
def crops(
    name: Annotated[str, Option("--crops", help="default, global-local, adjacent, ..., or all.")] = "default",
    size: Annotated[str, Option(help="Size of the images in pixels: a side, or HEIGHTxWIDTH.")] = "32",
    pairs: Annotated[int, Option(help="Number of pairs of crops.")] = 1_000_000,
    out: Annotated[Path | None, Option("--out", "-o", help="Also draw coverage and shares.")] = None,
    sampler: Annotated[
        str, Option(metavar="ours|torchvision", help="Implementation of the crops; torchvision is slow.")
    ] = "ours",
    seed: Annotated[int, Option(min=0, max=SEEDS, help="Seed of the crops.")] = 0,
    as_json: Json = False,
) -> None:
    """Count the relative positions of two crops of an image: nested, disjoint, or partially overlapping."""
    with report_errors(as_json):
        from inbatch.apps.reports import crop_statistics as inspect

        names, sides = inspect.choose_crops(name, sampler), inspect.parse_size(size)
        file = None if out is None else requested_output(out)
        statistics: list[inspect.CropStatistics] = []

        def count() -> dict[str, Any]:
            for one in names:
                statistics.append(
                    inspect.count_configurations(one, sides, pairs, seed, sampler, partial(typer.echo, err=True))
                )
            options = {"size": sides, "pairs": pairs, "sampler": sampler, "seed": seed, "out": file and str(file)}
            return options | {"crops": {t.name: t.json() for t in statistics}}

        def show(result: dict[str, Any]) -> None:
            print_table(inspect.HEADINGS, inspect.table_rows(statistics, sides), numbers=True)
            say("", f"{pairs:,} pairs of {sides[0]} x {sides[1]} pixels, drawn by {sampler}")

        def write(result: dict[str, Any]) -> None:
            if file is not None:
                inspect.plot(statistics, sides, pairs, file)
                say(*([] if as_json else [f"Picture: {file}"]))

        emit_result(count, as_json, show, write)


@app.command(epilog="Examples:\n\n  inbatch methods\n\n  inbatch methods moco")
def methods(
    name: Annotated[
        str | None, Argument(metavar="NAME", help="One method, or MODULE:NAME: its options, presets, sources.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the available methods; with a NAME, show its options and presets."""
    with report_errors(as_json):
        if name is not None:
            description = explain_method(typed("method", name))
            print_json(description) if as_json else print_method(description)
            return
        every, others, broken = explain_methods()
        if as_json:
            more = {"parts": others, "broken": broken}
            print_json({"methods": every} | {key: value for key, value in more.items() if value})
            return
        print_methods(every, others)
        for sentence in broken.values():
            warn(sentence)


@app.command(epilog="Examples:\n\n  inbatch plugins\n\n  inbatch plugins conv")
def plugins(
    name: Annotated[str | None, Argument(metavar="NAME", help="One plug-in: its options.")] = None,
    as_json: Json = False,
) -> None:
    """List the plug-ins by which samples interact before the loss; with a NAME, show its options.

    Fusion, curation and attention work with every method.
    """
    with report_errors(as_json):
        every = explain_plugins()
        if name is None:
            print_json({"plugins": every}) if as_json else print_plugins(every)
            return
        known = {plugin["name"]: plugin for plugin in every}
        if name not in known:
            raise ConfigError(f"unknown plug-in {name!r}: choose one of {', '.join(known)}")
        print_json(known[name]) if as_json else print_plugin(known[name])
