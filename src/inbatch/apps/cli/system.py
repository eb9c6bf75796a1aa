"""Commands for speed and the machine: bench, doctor, slurm."""

from importlib import resources
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from inbatch.apps.cli.app import Device, Json, app, emit_result, report_errors
from inbatch.apps.console import print_json, print_table, say
from inbatch.runtime import tuning
from inbatch.runtime.paths import expanded, path_of


@app.command(
    epilog="Examples:\n\n  inbatch bench --quick     a functional check, some minutes\n\n"
    "  inbatch bench views data --image-size 224 --peers --out bench.json\n\n"
    "  inbatch bench network step --method simclr --method moco --batch-size 512 --device cuda --compile",
)
def bench(
    sections: Annotated[
        list[str] | None, Argument(metavar="[SECTION]...", help="views, network, step, loss, data, evaluation.")
    ] = None,
    size: Annotated[
        int, Option("--image-size", "--size", help="Side of the views in pixels: 32, or 224 from photographs.")
    ] = 32,
    batch: Annotated[
        int | None, Option("--batch-size", "--batch", help="Samples per step; default 256 at 32 pixels, 64 at 224.")
    ] = None,
    encoder: Annotated[str | None, Option(help="Encoder; default resnet18.")] = None,
    method: Annotated[list[str] | None, Option(help="Method to measure; repeatable; default simclr.")] = None,
    threads: Annotated[int | None, Option(help="Threads; default: 1 for views and decoding, else all cores.")] = None,
    device: Device = "auto",
    data: Annotated[str | None, Option(help="JPEG files for step and data; default: synthetic ones.")] = None,
    peers: Annotated[
        bool | None, Option("--peers/--no-peers", help="Measure other libraries; default: if installed.")
    ] = None,
    peers_python: Annotated[
        str | None, Option(metavar="PATH", help="Python interpreter with the other libraries.")
    ] = None,
    rounds: Annotated[int | None, Option(help="Rounds per implementation; default 7.")] = None,
    compile: Annotated[bool, Option("--compile", help="Also measure compiled networks and steps.")] = False,
    quick: Annotated[bool, Option("--quick", help="Small sizes: a functional check, no measurement.")] = False,
    out: Annotated[Path | None, Option("--out", "-o", metavar="FILE", help="Write all results as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Benchmark this machine against its peak rates and other libraries, with implementations measured in turns."""
    with report_errors(as_json):
        from inbatch.apps.bench import benchmark
        from inbatch.apps.bench.options import Options
        from inbatch.apps.bench.report import print_comparison, print_machine

        options = Options(
            tuple(sections or ()), size, batch, encoder, tuple(method or ["simclr"]), threads, device, expanded(data),
            peers, expanded(peers_python), rounds, quick, compile, out and path_of(out, "--out"),
        )  # fmt: skip
        show = (lambda comparison: None) if as_json else print_comparison
        emit_result(lambda: benchmark.bench(options, show), as_json, print_machine)


@app.command(
    epilog="Examples:\n\n  inbatch doctor\n\n  inbatch doctor --no-measure\n\n  inbatch doctor --clear-cache",
)
def doctor(
    measure: Annotated[bool, Option(help="Measure the gain of settings on the CPU, for at most a minute.")] = True,
    clear_cache: Annotated[bool, Option("--clear-cache", help="Remove decoded images kept for the next run.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Report the capabilities of this machine, which are in use, what they gain, and how to enable the others."""
    with report_errors(as_json):
        tuning.ready()
        from inbatch.apps import doctor as checks
        from inbatch.apps.forecast import forecast

        cleared = checks.cache.clear() if clear_cache else None
        findings, measured = checks.examine(device), None
        if measure:
            findings += forecast(until=tuning.started + checks.FORECAST)  # first, because most users need it
            measured = checks.measure(until=tuning.started + checks.MEASURED)
        if as_json:
            result = {"found": [vars(one) for one in findings], "measured": measured}
            print_json(result if cleared is None else result | {"cleared_bytes": cleared})
            return
        if cleared is not None:
            say(f"{cleared / 1e9:,.2f} GB of decoded images removed", "")
        print_table(("", "here"), [(one.what, one.state) for one in findings])
        if measured is not None:
            say("")
            threads = measured["threads"]
            what = f"measured; {threads} thread{'s' * (threads > 1)}, {measured['batch']} images a step"
            print_table((what, "reached", "times as fast"), checks.measurement_rows(measured), numbers=True)
        wanted = [one.advice for one in findings if one.advice]
        say("", *(["Could be faster:", *(f"  {advice}" for advice in wanted)] if wanted else ["Nothing to do."]))


@app.command(
    epilog="Examples:\n\n  inbatch slurm > job.sbatch\n\n  sbatch job.sbatch simclr --data ~/photos --epochs 800",
)
def slurm() -> None:
    """Print a batch script for SLURM that saves before the time limit, requeues the job, and resumes the run."""
    print(resources.files("inbatch.apps.cli").joinpath("job.sbatch").read_text("utf-8"), end="")
