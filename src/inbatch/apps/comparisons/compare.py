"""Compare variants of a run over seeds (`inbatch compare`): run, resume, test, and write the table."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inbatch.apps.comparisons import render
from inbatch.apps.comparisons.array_script import array_script
from inbatch.apps.comparisons.metrics import metric_named
from inbatch.apps.comparisons.plan import Plan, plan_comparison
from inbatch.apps.comparisons.report import report
from inbatch.apps.comparisons.request import Request, with_length
from inbatch.apps.comparisons.runner import ComparisonRunner
from inbatch.apps.comparisons.timing import budget_sentence, expected_seconds
from inbatch.apps.comparisons.variants import code_of, variants_of
from inbatch.apps.papers.results import read_records
from inbatch.errors import ConfigError, InbatchError, check_whole, many
from inbatch.runtime import own_parts, tuning
from inbatch.runtime.device import device_for
from inbatch.runtime.files import check_writable, replacing, write_json
from inbatch.runtime.isolation import isolated
from inbatch.runtime.path_list import joined_paths
from inbatch.runtime.paths import path_of
from inbatch.runtime.remote import public
from inbatch.runtime.terminal import progress
from inbatch.training.budget import duration, parse_budget

FILES = ("comparison.md", "comparison.csv", "comparison.txt", "comparison.json")
MOST_SEEDS = 1000
_NOT_COMMON = {"seed": "use --seeds", "budget": "use --budget", "data": "use --data", "replans": "leave it out"}


@isolated
def compare(
    variants: Sequence[str], data: Any, *, seeds: int | Sequence[int] = 3, metric: str | None = None,
    epochs: int | None = None, budget: Any = None, settings: Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None, out: str | Path | None = None, all_pairs: bool = False,
    detect: float | None = None, jobs: int | None = None, device: str = "auto", download: bool = False,
    retry_failed: bool = False, run: bool = True, slurm: str | Path | None = None, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Run variants of a training over the same images and seeds, and return tested differences, ready for JSON.

    Runs that exist in the folder, also of an earlier comparison, are not repeated; interrupted ones are resumed. The
    result is written to the folder as comparison.md, comparison.csv, comparison.txt and comparison.json.

    Args:
        variants: Command lines, ["pretrain simclr", "pretrain simclr --fuse conv"]; others are compared with the first.
        data: Images to learn from, as for `pretrain`: a path, several paths, or the name of a data set.
        seeds: Number of seeds from 0, or the seeds.
        metric: Tested figure, a name of `METRICS`; by default k-NN, without labels the share of images found again.
        epochs: Epochs of every variant that sets no length.
        budget: Time of the whole call, such as "2h": what planning and evaluation leave is divided over the runs.
        settings: Settings of all variants, {"batch_size": 128}; a variant may override them.
        grid: Setting -> values; every variant is run with every combination.
        out: Folder of runs and result; runs/compare-DATA by default.
        all_pairs: Compare all pairs of variants, not only every variant with the first.
        detect: A difference, in the unit of the metric (points for shares), for which the number of seeds is stated.
        jobs: Number of concurrent runs; by default one per core, on a GPU one.
        device: Device of the runs, or "auto".
        download: Download a torchvision data set that is missing.
        retry_failed: Repeat failed runs.
        run: Run what is missing; False uses the runs that exist.
        slurm: Write this script for an array of SLURM jobs, and run nothing.
        quiet: Print no progress.

    Returns:
        "variants": figures of each, "comparisons": differences, tests and a sentence for each, "best": of three or more
        variants, "notes", "runs", and "problems": variants whose runs could not be made, with "exit_code".

    Raises:
        ConfigError: For a variant or setting that is invalid, or a folder with runs on other images.
        DataError: If the images cannot be read, or have no labels for the metric.
        InbatchError: If the folder cannot be written.
        Preempted, Interrupted: After a signal; the same call continues.
    """
    began = tuning.command_began()
    request = _request(variants, data, seeds, epochs, budget, settings, grid, download)
    folder = path_of(f"runs/compare-{request.name}" if out is None else out, "out")
    tested = None if metric is None else metric_named(metric)
    script = None if slurm is None else path_of(slurm, "slurm")
    if jobs is not None:
        check_whole("jobs", jobs, 1)
    if detect is not None and not (isinstance(detect, int | float) and detect > 0):
        raise ConfigError(f"detect = {detect!r}: give a difference above 0, in the unit of the metric")
    with own_parts.using(code_of(request.variants)), progress(quiet) as (notify, show):
        runner = ComparisonRunner(
            folder / "results", folder, {request.name: request.place}, jobs=jobs, device=device, download=download,
            retry_failed=retry_failed, notify=notify, show=show,
            code={variant.name: variant.code for variant in request.variants},
        )  # fmt: skip
        request = with_length(request, device_for(device), runner.jobs or 1)
        if script is not None:
            _check_script(script, request)
        plan = plan_comparison(request, tested, runner, began)
        for name in FILES:
            check_writable(folder / name)
        words = _command(variants, request, folder, metric, grid, (all_pairs, detect, epochs))
        if script is not None:
            return _write_script(script, plan, runner, words)
        problems = _run(plan, request, runner, run, began)
        if request.budget is not None and run:
            used = duration(time.perf_counter() - began)
            notify(f"Budget of {duration(request.budget)}: this command took {used}.")
    result: dict[str, Any] = {"command": render.command(words), "out": str(folder)}
    result |= report(plan, read_records(runner.results), all_pairs=all_pairs, detect=detect)
    result["problems"] = {name: str(problem) for name, problem in problems.items()}
    _write(folder, result)
    if problems:
        first = next(iter(problems.values()))
        result |= {"error": "; ".join(dict.fromkeys(result["problems"].values())), "exit_code": first.exit_code}
    return result


def _request(
    variants: Sequence[str], data: Any, seeds: int | Sequence[int], epochs: int | None, budget: Any,
    settings: Mapping[str, Any] | None, grid: Mapping[str, Sequence[Any]] | None, download: bool,
) -> Request:  # fmt: skip
    common = dict(settings or {}) | ({} if epochs is None else {"epochs": epochs})
    for key, how in _NOT_COMMON.items():
        if key in common:
            raise ConfigError(f"{key} is not a setting of the variants of a comparison: {how}")
    place = joined_paths(data)
    if not isinstance(place, str | Path):
        raise ConfigError("a comparison needs data on the disk or the name of a data set, because runs are processes")
    place = str(Path(place).absolute()) if Path(place).exists() else str(place)
    if public(place) != place:
        raise ConfigError(
            f"data = {public(place)!r} was given with credentials in its URL, which the recipes and scripts of a "
            "comparison would keep: pass them by the settings of the file system's package, such as environment "
            "variables"
        )
    rows = variants_of(variants, grid)
    return Request(
        tuple(rows), place, _seeds(seeds), common, None if budget is None else parse_budget(budget), download
    )


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(seeds, list | tuple):
        for seed in seeds:
            check_whole("seeds", seed, 0)
        if not seeds or len(set(seeds)) < len(seeds):
            raise ConfigError(f"seeds = {list(seeds)}: give different seeds, such as 0,1,2")
        return tuple(seeds)
    check_whole("seeds", seeds, 1)
    count = int(seeds)  # type: ignore[arg-type] # checked above
    if count > MOST_SEEDS:
        raise ConfigError(f"seeds = {count} is a number of seeds, at most {MOST_SEEDS}; a list such as 7,8 names them")
    return tuple(range(count))


def _run(plan: Plan, request: Request, runner: ComparisonRunner, run: bool, began: float) -> dict[str, InbatchError]:
    """Run the missing runs, and return the errors of those that failed."""
    runner.results.mkdir(parents=True, exist_ok=True)
    if not run:
        runner.collect(plan.cells)
        return {}
    missing = runner.missing(plan.cells)
    if missing:
        done = len({cell.stem for cell in plan.cells}) - len(missing)
        finished = f", {done} are finished" if done else ""
        runner.notify(f"{many(len(missing), 'run')} to make{finished}, {runner.jobs} at a time.")
        if plan.shares is not None:
            left = (request.budget or 0.0) - (time.perf_counter() - began)
            runner.notify(budget_sentence(plan.shares, len(missing), runner.jobs or 1, left))
        else:
            seconds, timed = expected_seconds(missing, request.place, runner)
            runner.notify(
                f"Expected: about {duration(seconds / min(runner.jobs or 1, len(missing)))} of training, by timed "
                f"steps of {many(timed, 'variant')}; the start and the evaluation of each run are not counted."
            )
    return runner.run(plan.cells)


def _check_script(file: Path, request: Request) -> None:
    if request.budget is not None:
        raise ConfigError(
            "a budget divides the time of this machine and not of a cluster: set the length by --epochs, or by "
            "--set steps=NUMBER"
        )
    check_writable(file)


def _write_script(script: Path, plan: Plan, runner: ComparisonRunner, words: list[str]) -> dict[str, Any]:
    """Write the recipes of the missing runs and the script that makes them."""
    missing = runner.missing(plan.cells)
    if not missing:
        raise ConfigError(f"no run is missing in {runner.work}: leave out --slurm")
    tasks = []
    for cell in missing:
        place = runner.place(str(cell.settings["data"]))
        write_json(runner.work / f"{cell.stem}.json", cell.recipe().nested() | {"data": place})
        tasks.append((runner.work / cell.stem, runner.code_words(cell)))
    table = [*words, "--no-run"]
    text = array_script(script, tasks, table, python=sys.executable, download=runner.download)
    with replacing(script) as file:
        file.write(text.encode())
    return {"script": str(script), "tasks": len(missing), "out": str(runner.work), "render": render.command(table)}


def _command(
    variants: Sequence[str], request: Request, folder: Path, metric: str | None,
    grid: Mapping[str, Sequence[Any]] | None, more: tuple[bool, float | None, int | None],
) -> list[str]:  # fmt: skip
    """Return the command line of the comparison."""
    all_pairs, detect, epochs = more
    seeds = request.seeds
    plain = seeds == tuple(range(len(seeds)))
    words = ["inbatch", "compare", *variants, "--data", request.place, "--out", str(folder)]
    words += ["--seeds", str(len(seeds)) if plain else ",".join(map(str, seeds)) + ("," if len(seeds) == 1 else "")]
    words += [] if epochs is None else ["--epochs", str(epochs)]
    words += [] if request.budget is None else ["--budget", f"{request.budget:.12g}s"]
    words += [] if metric is None else ["--metric", metric]
    for key, values in (grid or {}).items():
        words += ["--grid", f"{key}={','.join(map(_plain, values))}"]
    for key, value in request.common.items():
        words += [] if key == "epochs" and epochs is not None else ["--set", f"{key}={_plain(value)}"]
    words += ["--all-pairs"] if all_pairs else []
    return words + ([] if detect is None else ["--detect", f"{detect:g}"])


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _write(folder: Path, result: dict[str, Any]) -> None:
    """Write the result in every format."""
    texts = {
        "comparison.md": render.markdown(result),
        "comparison.csv": render.table_csv(result),
        "comparison.txt": render.text(result),
    }
    for name, text in texts.items():
        with replacing(folder / name) as file:
            file.write(text.encode(errors="backslashreplace"))
    write_json(folder / "comparison.json", result)
