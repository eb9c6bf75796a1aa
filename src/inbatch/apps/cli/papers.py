"""The command for tables and figures of papers: table."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from inbatch.apps.cli.app import Device, Json, Quiet, app, emit_result, report_errors
from inbatch.apps.console import print_error, print_json, print_table, say, width
from inbatch.errors import ConfigError
from inbatch.runtime.paths import expanded, path_of


@app.command(
    epilog="Examples:\n\n  inbatch table     the list of tables\n\n"
    "  inbatch table ba-ssl-3     published and reproduced figures, and every command\n\n"
    "  inbatch table ba-ssl-3 --scale cpu --data cifar10=cifar/\n\n"
    "  inbatch table ba-ssl-3 --scale cpu --dataset digits --seed 0\n\n"
    "  inbatch table ba-ssl-3 --from results/records -o table.html",
)
def table(
    name: Annotated[
        str | None, Argument(metavar="NAME", help="ba-ssl-3, curation-1, ...; without a name all are listed.")
    ] = None,
    scale: Annotated[
        str | None,
        Option(metavar="SCALE", help="Run missing cells: smoke, cpu, laptop, gpu; or paper: print the commands."),
    ] = None,
    from_: Annotated[
        Path | None,
        Option(
            "--from", metavar="FOLDER", help="Run nothing; use the results of this folder. Default: shipped results."
        ),
    ] = None,
    row: Annotated[list[str] | None, Option(help="Only this row, and the row it is compared with; repeatable.")] = None,
    on: Annotated[
        list[str] | None, Option("--dataset", "--on", metavar="DATA", help="Only this data set of the table.")
    ] = None,
    seed: Annotated[list[int] | None, Option(min=0, help="Only this seed.")] = None,
    data: Annotated[
        list[str] | None, Option(metavar="NAME=PATH", help="Path of a data set, such as cifar10=PATH.")
    ] = None,
    work: Annotated[Path, Option("--work-dir", "--work", help="Directory of the runs.")] = Path("runs/table"),
    results: Annotated[
        Path | None,
        Option(metavar="FOLDER", help="Directory of the results, one file per run; default WORK_DIR/results."),
    ] = None,
    out: Annotated[Path | None, Option("--out", "-o", metavar="FILE", help="Output file, .md, .tex or .html.")] = None,
    jobs: Annotated[
        int | None, Option(min=1, help="Simultaneous runs; default: one per core, or one on a GPU.")
    ] = None,
    device: Device = "auto",
    precision: Annotated[
        str, Option(metavar="auto|bf16|float32", help="Precision of the runs; auto: that of the machine.")
    ] = "auto",
    download: Annotated[bool, Option("--download", help="Download torchvision data sets that are missing.")] = False,
    again: Annotated[bool, Option("--retry-failed", "--again", help="Repeat failed runs.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show or run a table or figure of a paper: published and reproduced figures, differences, and commands."""
    with report_errors(as_json):
        from inbatch.apps.papers import TABLES
        from inbatch.apps.papers.command import Selection, run_table_command
        from inbatch.apps.papers.runner import PRECISIONS, Runner
        from inbatch.runtime.terminal import progress
        from inbatch.training.registry import check_known

        if name is None:
            rows = [(t.name, t.title, t.source) for t in TABLES.values()]
            entries = [{"name": n, "title": title, "source": source} for n, title, source in rows]
            print_json({"tables": entries}) if as_json else print_table(("table", "what", "source"), rows)
            return
        work, file = path_of(work, "--work-dir"), None if out is None else path_of(out, "--out")
        records = work / "results" if results is None else path_of(results, "--results")
        check_known("precision", precision, PRECISIONS)
        with progress(quiet) as (notify, show):
            runner = Runner(
                records, work, _places(data), jobs=jobs, device=device, precision=precision, download=download,
                retry_failed=again, notify=notify, show=show,
            )  # fmt: skip
            report = run_table_command(
                TABLES,
                name,
                scale,
                runner=runner,
                from_=from_ and path_of(from_, "--from"),
                out=file,
                selection=Selection(row or (), on or (), seed or ()),
            )

        def show_table(result: dict[str, Any]) -> None:
            for part in report.grids(width(numbers=True)):
                print_table(*part, numbers=True)
                say("")
            say(*report.text_lines())

        def write(result: dict[str, Any]) -> None:
            if file is not None:
                report.write(file)
                say(*([] if as_json else ["", f"Written to: {file}"]))

        emit_result(report.json, as_json, show_table, write)
    if report.problems:
        for sentence in dict.fromkeys(map(str, report.problems.values())):
            print_error(sentence)
        raise typer.Exit(report.exit_code)


def _places(texts: list[str] | None) -> dict[str, str]:
    """Return NAME=PATH arguments as a mapping, with absolute paths: results are searched for them to leave them out."""
    places: dict[str, Any] = {}
    for text in texts or ():
        name, equals, path = text.partition("=")
        if not (equals and name and path):
            raise ConfigError(f"--data takes NAME=PATH, for example cifar10=~/cifar-10-batches-py, not {text!r}")
        place = expanded(path)
        places[name] = str(Path(place).absolute()) if Path(place).exists() else place
    return places
