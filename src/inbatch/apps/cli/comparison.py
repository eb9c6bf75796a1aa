"""Commands for own comparisons: compare, runs."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from inbatch.apps.cli.app import Device, Json, Quiet, app, assignments, emit_result, report_errors
from inbatch.apps.console import print_error, print_table, say, warn, width
from inbatch.errors import ConfigError, listed, many


@app.command(
    epilog="Examples:\n\n"
    '  inbatch compare "pretrain simclr" "pretrain simclr --fuse conv" --data ~/photos --epochs 20\n\n'
    '  inbatch compare "pretrain simclr" "pretrain vicreg" --data ~/photos --seeds 5 --budget 2h\n\n'
    '  inbatch compare "pretrain simclr" "pretrain my_module:MyMethod" --data ~/photos --epochs 20\n\n'
    '  inbatch compare "pretrain simclr" --grid method.temperature=0.1,0.2,0.5 --data ~/photos --epochs 20\n\n'
    '  inbatch compare "pretrain simclr" "pretrain byol" --data ~/photos --epochs 100 --slurm jobs.sh',
)
def compare(
    variants: Annotated[
        list[str],
        Argument(metavar='"pretrain ..."...', help="Commands of runs, each in quotes, compared with the first."),
    ],
    data: Annotated[list[str], Option(help="Images of all runs, as for inbatch pretrain.")],
    seeds: Annotated[str, Option(metavar="N|A,B,...", help="Number of seeds from 0, or the seeds.")] = "3",
    metric: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="Tested figure: knn, probe, clustering, few, ...; without labels same_image, rankme, ...",
        ),
    ] = None,
    epochs: Annotated[int | None, Option(min=1, help="Epochs of variants that set no length.")] = None,
    budget: Annotated[
        str | None, Option(metavar="TIME", help="Time of the whole comparison, in equal parts: 2h, 1d.")
    ] = None,
    grid: Annotated[
        list[str] | None, Option(metavar="KEY=V1,V2", help="Run every variant with each of these values; repeatable.")
    ] = None,
    set_: Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help="A setting of all variants.")] = None,
    out: Annotated[
        Path | None, Option("--out", "-o", metavar="DIR", help="Folder of runs and table; default runs/compare-DATA.")
    ] = None,
    all_pairs: Annotated[bool, Option("--all-pairs", help="Test all pairs, not only against the first.")] = False,
    detect: Annotated[
        float | None, Option(metavar="SIZE", help="State the number of seeds that show a difference of this size.")
    ] = None,
    jobs: Annotated[
        int | None, Option(min=1, help="Simultaneous runs; default: one per core, or one on a GPU.")
    ] = None,
    again: Annotated[bool, Option("--retry-failed", help="Repeat failed runs.")] = False,
    no_run: Annotated[bool, Option("--no-run", help="Run nothing: write the table of the runs that exist.")] = False,
    slurm: Annotated[
        Path | None, Option(metavar="FILE", help="Write this script, for an array of SLURM jobs, instead of running.")
    ] = None,
    device: Device = "auto",
    download: Annotated[bool, Option("--download", help="Download a torchvision data set that is missing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare variants of a run over seeds: means, paired tests, and what more seeds would show."""
    failure: dict[str, Any] = {}
    with report_errors(as_json):
        if slurm is not None and str(slurm).startswith("-"):
            raise ConfigError(f"--slurm needs the file of the script, and got {slurm}: write --slurm FILE {slurm} ...")
        from inbatch.apps.comparisons.compare import compare as run
        from inbatch.apps.comparisons.variants import parse_grid

        def compute() -> dict[str, Any]:
            result = run(
                variants, data, seeds=_seeds(seeds), metric=metric, epochs=epochs, budget=budget,
                settings=assignments(set_), grid=parse_grid(grid or ()), out=out, all_pairs=all_pairs, detect=detect,
                jobs=jobs, device=device, download=download, retry_failed=again, run=not no_run, slurm=slurm,
                quiet=quiet,
            )  # fmt: skip
            failure.update({key: result[key] for key in ("error", "exit_code") if key in result})
            return result

        emit_result(compute, as_json, _show_comparison)
    if failure:
        print_error(failure["error"])
        raise typer.Exit(failure["exit_code"])


def _seeds(text: str) -> int | list[int]:
    """Return "3" as a number of seeds, and "4,5,6" or "4," as the seeds."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts if part) or not any(parts):
        raise ConfigError(f"--seeds {text!r}: write a number of seeds, such as 3, or the seeds, such as 10,11,12")
    return int(parts[0]) if len(parts) == 1 else [int(part) for part in parts if part]


def _show_comparison(result: dict[str, Any]) -> None:
    from inbatch.apps.comparisons import render
    from inbatch.apps.papers.render import column_groups

    if "script" in result:
        say(f"Script: {result['script']} ({result['tasks']} tasks)", "")
        say(f"  bash {result['script']}          submit it", f"  bash {result['script']} 0        run one task here")
        say(f"  bash {result['script']} render   write the table")
        return
    tables = (render.variant_grid(result), render.comparison_grid(result))
    for headings, rows in tables:
        for group in column_groups(headings, rows, width(numbers=True)):
            chosen = (0, *group)
            print_table([headings[i] for i in chosen], [[row[i] for i in chosen] for row in rows], numbers=True)
            say("")
    say(*render.sentences(result), "", *render.notes(result), "", f"Written to: {result['out']}/comparison.md")


@app.command(
    epilog="Examples:\n\n  inbatch runs runs -o runs.html\n\n"
    "  inbatch runs runs/compare-photos runs/simclr-photos-1 -o runs.html\n\n"
    "  inbatch runs results/records -o records.html",
)
def runs(
    folders: Annotated[
        list[Path], Argument(metavar="DIR...", help="Run folders, folders that hold some, or folders of records.")
    ],
    out: Annotated[Path, Option("--out", "-o", help="HTML file to write; replaced if it exists.")] = Path("runs.html"),
    as_json: Json = False,
) -> None:
    """Write a page of many runs as one HTML file that works offline: table, curves, differences of recipes."""
    with report_errors(as_json):
        from inbatch.apps.reports.runs_page.page import write_runs_page

        def show(result: dict[str, Any]) -> None:
            say(f"Page: {result['out']} ({many(result['runs'], 'run')}, {result['bytes'] / 1e6:,.1f} MB)")
            if result["unreadable"]:
                warn(f"not on the page: {listed(result['unreadable'], 3, '; ')}")

        emit_result(lambda: write_runs_page(folders, out), as_json, show)
