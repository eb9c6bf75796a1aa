"""Time to an accuracy on CIFAR-10 with two processor cores, over seeds.

    python benchmarks/record.py run DATA --target 75 --name NAME -- simclr --preset fast --epochs 60
    python benchmarks/record.py render

`run` trains once for each seed by `inbatch pretrain` with the words after --, and states the wall time of the whole
command: start, reading, training, its own evaluations, writing. `inbatch evaluate` then measures the encoder with all
50,000 training images as the bank and all 10,000 test images as queries, which is not timed. It writes
results/record/NAME.json; finished seeds are not run again. `render` writes the table of docs/record.md.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from inbatch.api import prepare
from inbatch.apps.bench.accuracy import flags
from inbatch.apps.bench.inbatch_workloads import work_of
from inbatch.apps.console import say
from inbatch.errors import ConfigError, InbatchError
from inbatch.runtime.environment import environment
from inbatch.runtime.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "results" / "record", ROOT / "docs" / "record.md"
BEGIN, END = "<!-- entries -->", "<!-- end of entries -->"
GPU_PEAK, GPU_SHARE = 312e12, 0.3
"""Operations per second of an A100 in bf16, and the share of them that small convolutions may reach."""
SEEDS = (0, 1, 2)


def command(words: list[str], threads: int) -> dict[str, Any]:
    """Return the JSON object of an inbatch command; raise InbatchError with its message if it fails."""
    words = [sys.executable, "-m", "inbatch", *words, "--json"]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    result: dict[str, Any] = json.loads(done.stdout or "{}")
    if done.returncode:
        raise InbatchError(result.get("error", f"inbatch ended with exit code {done.returncode}"))
    return result


def operations(run: Path, data: Path) -> float:
    """Return the floating-point operations of the networks in all steps, forward and backward, as torch counts them.

    Views and evaluations are not included.
    """
    recipe, steps = read_json(run / "recipe.json"), read_json(run / "result.json")["steps"]
    side, until = recipe["image_size"], recipe["grow_until"]

    def per_step(side: int) -> int:
        sizes = {"image_size": side, "views.size": side, "grow_until": 0.0}
        built = prepare(data, config=run / "recipe.json", settings=sizes, device="cpu")
        return work_of(built, next(iter(built.loader.epoch(0))))

    small = per_step(round(side * recipe["grow_from"])) if until else 0
    return steps * (until * small + (1 - until) * per_step(side))


def one_seed(data: Path, words: list[str], seed: int, folder: Path, threads: int) -> dict[str, Any]:
    """Train and evaluate with one seed, unless that is done; return the figures. ConfigError for one of other words."""
    kept, asked = folder / "timed.json", {"words": words, "data": data.resolve().name, "threads": threads}
    if kept.is_file():
        figures = read_json(kept)
        if figures.pop("asked", None) != asked:
            raise ConfigError(f"{folder} is of other words, data or threads: give another --name, or remove it")
        return figures
    load_before, began, used = os.getloadavg()[0], time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    line = ["pretrain", *words, "--data", str(data), "--seed", str(seed), "--out", str(folder), "--device", "cpu"]
    command([*line, "--overwrite", "--quiet"], threads)
    seconds, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    result = read_json(folder / "result.json")
    evaluation = command(["evaluate", str(folder), "--data", str(data), "--device", "cpu"], threads)
    figures = {
        "seed": seed, "seconds": seconds, "cpu_seconds": cpu, "training_seconds": result["training_seconds"],
        "load_before": load_before, "steps": result["steps"], "operations": operations(folder, data),
        "knn": evaluation["knn"]["top1"], "linear": evaluation["linear"]["top1"], "bank": evaluation["train"]["images"],
        "queries": evaluation["test"]["images"], "curve": result["curve"],
    }  # fmt: skip
    write_json(kept, figures | {"asked": asked})
    return figures


def run(args: argparse.Namespace) -> None:
    """Run every seed and write the entry, after each seed."""
    seeds = []
    for seed in args.seeds:
        figures = one_seed(args.data, args.words, seed, args.work / f"{args.name}-s{seed}", args.threads)
        say(f"seed {seed}: k-NN {figures['knn']:.2%} after {figures['seconds']:,.0f} s")
        seeds.append(figures)
        entry = {
            "name": args.name, "target": args.target, "words": args.words, "date": str(datetime.now(UTC).date()),
            "data": args.data.resolve().name, "threads": args.threads, "seeds": seeds,
            "environment": environment(torch.device("cpu")) | {"flags": flags()},
        }  # fmt: skip
        write_json(RESULTS / f"{args.name}.json", entry)
    average = mean(one["knn"] for one in seeds)
    say(f"mean k-NN {average:.2%}: {'reaches' if 100 * average >= args.target else 'does not reach'} {args.target:g} %")


def rows(entries: list[dict[str, Any]]) -> str:
    """Return the table of the entries: those that reach their target, the fastest of each target first."""
    lines = [
        "| target | k-NN, mean (each seed) | seconds, mean | processor seconds | recipe | machine | GPU, counted |",
        "| ---: | --- | ---: | ---: | --- | --- | ---: |",
    ]
    for entry in sorted(entries, key=lambda e: (e["target"], mean(s["seconds"] for s in e["seeds"]))):
        seeds, where = entry["seeds"], entry["environment"]
        knn = ", ".join(f"{100 * one['knn']:.2f}" for one in seeds)
        reached = mean(100 * one["knn"] for one in seeds) >= entry["target"]
        gpu = mean(one["operations"] for one in seeds) / (GPU_PEAK * GPU_SHARE)
        busy = max(one["load_before"] for one in seeds)
        lines.append(
            f"| {entry['target']:g} % | {100 * mean(one['knn'] for one in seeds):.2f} ({knn})"
            f"{'' if reached else ', not reached'} | {mean(one['seconds'] for one in seeds):,.0f} "
            f"| {mean(one['cpu_seconds'] for one in seeds):,.0f} | `{' '.join(entry['words'])}` "
            f"| {where['processor']}, {entry['threads']} threads, torch {where['versions']['torch']}, commit "
            f"{where.get('commit') or 'unknown'}, {entry['date']}, load before {busy:.1f} | {gpu:,.1f} s |"
        )
    return "\n".join(lines)


def render() -> str:
    """Return the page with the table of the entries in results/record."""
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    entries = [read_json(path) for path in sorted(RESULTS.glob("*.json"))]
    return f"{before}{BEGIN}\n\n{rows(entries)}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    running = commands.add_parser("run", help="train, time and evaluate a recipe")
    running.add_argument("data", type=Path, help="folder with train.parquet and test.parquet")
    running.add_argument("--target", type=float, default=75.0, help="k-NN accuracy in percent")
    running.add_argument("--name", required=True, help="name of the entry")
    running.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    running.add_argument("--threads", type=int, default=2)
    running.add_argument("--work", type=Path, default=Path("runs/record"), help="directory of the runs")
    running.add_argument("words", nargs="+", help="words of inbatch pretrain, after --")
    commands.add_parser("render", help="write the table of docs/record.md")
    args = parser.parse_args()
    if args.what == "render":
        PAGE.write_text(render())
    else:
        run(args)


if __name__ == "__main__":
    main()
