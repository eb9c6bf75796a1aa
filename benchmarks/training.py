"""Training from JPEG files, compared with other libraries: python benchmarks/training.py --data cifar10/train.parquet

SimCLR with ResNet-18 at 32 pixels and SGD, as a user of each library gets it: inbatch's loader, views, precision and
settings of the process; lightly's CIFAR-10 recipe, Pillow images through its transforms in torch's DataLoader, eager
and in float32; solo-learn's transforms, loss and network if its files can be imported. The work is the same: batch,
network, two-layer head, NT-Xent. Each library runs in its own process; the processes alternate after --steps steps.
Reported are the median and spread of images/s over the turns, and the seconds from the start of the process to the end
of its first step. Writes results/training-STEM.json.

--curves trains in bf16 and in float32 from the same weights on the same views, and in float32 from another seed to show
the variation between curves; writes results/bf16.json and docs/bf16.png.
--wait streams photographs at 224 pixels and reports the share of the time that a step waits for them; writes
results/waiting.json.
--quick reduces all sizes: it shows that the script works, not the speed; --out is then required.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from inbatch import tune
from inbatch.api import prepare
from inbatch.apps.bench import synthetic_data
from inbatch.apps.bench.benchmark import ceilings
from inbatch.apps.bench.options import PEERS
from inbatch.apps.bench.report import print_comparison
from inbatch.apps.bench.runner import BenchmarkRounds, Implementation
from inbatch.apps.console import print_table, say
from inbatch.runtime.device import device_for
from inbatch.runtime.environment import environment
from inbatch.runtime.files import write_json
from inbatch.runtime.memory import threads
from inbatch.training.build import RunComponents

ROOT = Path(__file__).resolve().parents[1]


def network(args: argparse.Namespace) -> dict[str, Any]:
    """Return the encoder; a ResNet with the requested stem."""
    stem = {} if args.encoder == "tiny" else {"encoder.stem": args.stem}
    return {"encoder.name": args.encoder} | stem


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of inbatch for the work of lightly's CIFAR-10 benchmark."""
    return {
        "preset": "none", "image_size": 32, "batch_size": args.batch, **network(args),
        "method.layers": 2, "method.temperature": 0.5, "optimizer.name": "sgd", "optimizer.lr": 0.06 * 2,
        "optimizer.weight_decay": 5e-4,
    }  # fmt: skip


def jpegs(args: argparse.Namespace, folder: Path, size: int, count: int) -> str:
    """Return the requested data, else random files."""
    if args.data is not None:
        return str(args.data)
    files = synthetic_data.jpegs(synthetic_data.draw_images(args.batch if args.quick else count, size), size)
    return str(synthetic_data.write_folder(files, folder / "jpegs"))


def training(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure every library in alternation."""
    data = jpegs(args, folder, 32, 4096)
    synthetic_data.pack(synthetic_data.encoded(data, 10**6), folder)
    shared = {
        "size": 32, "batch": args.batch, "encoder": args.encoder, "stem": args.stem, "method": "simclr",
        "compile": False, "device": args.device, "threads": args.threads, "workers": args.workers, "seconds": 0.01,
        "calls": args.steps, "folder": str(folder), "data": data,
    }  # fmt: skip
    ours = shared | {"module": "inbatch.apps.bench.inbatch_workloads", "make": "step", "tune": True, "count": False}
    implementations = [
        Implementation("inbatch", ours | {"settings": recipe(args)}),
        Implementation("inbatch, float32", ours | {"settings": recipe(args) | {"precision": "float32"}}),
    ]
    for who, package in PEERS.items():
        job = shared | {"module": "peer_workloads", "make": "loop", "library": who, "needs": [package]}
        implementations.append(Implementation(who, job, args.peers_python, peer=True))
    title = f"SimCLR, {args.encoder}, {args.stem} stem, batch {args.batch}, from {Path(data).name}"
    known = ceilings(args.device, args.threads, args.quick)
    comparison = BenchmarkRounds(title, "images/s", implementations).run(args.rounds, known, show_missing=True)
    print_comparison(comparison)
    first = {who: row["first_seconds"] for who, row in comparison["implementations"].items() if "first_seconds" in row}
    say("Seconds to the end of the first step: " + ", ".join(f"{who} {s:.1f}" for who, s in first.items()))
    return {"ceilings": {str(args.threads): known}, "comparison": comparison}


def steps(run: RunComponents) -> Iterator[Any]:
    """Yield batches without end."""
    for epoch in range(10**9):
        yield from run.loader.epoch(epoch)


def curves(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the loss of every step, by precision and seed."""
    data, runs = jpegs(args, folder, 32, 4096), {}
    for name, precision, seed in (("bf16", "bf16", 0), ("float32", "float32", 0), ("float32, seed 1", "float32", 1)):
        settings = recipe(args) | {"precision": precision, "seed": seed, "epochs": 1000, "schedule.warmup_epochs": 0}
        run, losses, begin = prepare(data, "simclr", settings=settings, device=args.device), [], time.perf_counter()
        for number, batch in zip(range(args.steps), steps(run), strict=False):
            losses.append(float(run.step(batch, number)["loss"]))
            if number % 20 == 0:
                say(f"{name}: step {number}, loss {losses[-1]:.4f}")
        runs[name] = {"loss": losses, "images_per_second": len(losses) * args.batch / (time.perf_counter() - begin)}
    last = slice(-max(1, args.steps // 4), None)
    apart = {
        name: mean(abs(a - b) for a, b in zip(runs["float32"]["loss"][last], row["loss"][last], strict=True))
        for name, row in runs.items() if name != "float32"
    }  # fmt: skip
    say("Mean distance from float32 over the last quarter: " + ", ".join(f"{k} {v:.4f}" for k, v in apart.items()))
    return {"runs": runs, "apart": apart, "data": Path(data).name}


def plot(result: dict[str, Any], png: Path) -> None:
    """Draw the curves in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    panel = figure.subplots()
    styles = {"bf16": ("#0072b2", 1.6), "float32": ("#d55e00", 1.0), "float32, seed 1": ("#999999", 0.8)}
    for name, (colour, width) in styles.items():
        panel.plot(result["runs"][name]["loss"], label=name, color=colour, linewidth=width)
    panel.set(xlabel="step", ylabel="NT-Xent")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(png, dpi=120)


def waiting(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the share of its time that a loop over streamed photographs waits for the next batch."""
    data, rows = jpegs(args, folder, 224, max(512, 4 * args.batch)), {}
    for encoder in args.encoders:
        settings = {
            "preset": "none",
            "image_size": 224,
            "batch_size": args.batch,
            "encoder.name": encoder,
            "cache_on_device": False,
        }
        run = prepare(data, "simclr", settings=settings, device=args.device, workers=args.workers)
        batches, waited, worked = steps(run), [], []
        for number in range(args.steps + 2):
            begin = time.perf_counter()
            batch = next(batches)
            between = time.perf_counter()
            float(run.step(batch, number % run.total)["loss"])  # reading it waits for the device
            waited.append(between - begin)
            worked.append(time.perf_counter() - between)
        waited, worked = waited[2:], worked[2:]  # the workers start, the device warms up
        spent = sum(waited) + sum(worked)
        rows[encoder] = {
            "waiting": sum(waited) / spent, "images_per_second": len(worked) * args.batch / spent,
            "waited": waited, "worked": worked, "batch": args.batch, "workers": run.loader.workers,
        }  # fmt: skip
        del run, batches
    cells = [(k, f"{v['images_per_second']:,.1f}", f"{v['waiting']:.1%}") for k, v in rows.items()]
    print_table(("encoder", "images/s", "time spent waiting"), cells, numbers=True)
    return {"encoders": rows, "data": Path(data).name}


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a Parquet file or a folder of JPEG files; drawn ones by default")
    parser.add_argument("--stem", choices=("cifar", "imagenet"), default="cifar")
    parser.add_argument("--batch", type=int, help="256; with --wait 64")
    parser.add_argument("--steps", type=int, help="of a turn: 3; with --curves 200, with --wait 20")
    parser.add_argument("--rounds", type=int, default=7, help="turns of everyone")
    parser.add_argument("--threads", type=int, default=threads())
    parser.add_argument("--workers", type=int, default=2, help="processes that load, of everyone")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--encoders", nargs="+", help="with --wait; resnet18 and resnet50")
    parser.add_argument("--peers-python", default=sys.executable, help="a Python that has the other libraries")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--curves", action="store_true")
    kind.add_argument("--wait", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="the JSON file; in results/ by default")
    args = parser.parse_args(words)
    if args.quick and args.out is None:
        parser.error("--quick measures nothing worth keeping: say with --out where its file may go")
    args.encoder = "tiny" if args.quick else "resnet18"
    args.encoders = args.encoders or (["tiny"] if args.quick else ["resnet18", "resnet50"])
    args.batch = args.batch or (8 if args.quick else 64 if args.wait else 256)
    args.steps = args.steps or (2 if args.quick else 200 if args.curves else 20 if args.wait else 3)
    if min(args.batch - 1, args.steps, args.rounds, args.threads) < 1 or args.workers < 0:
        parser.error("a batch is 2 or more, steps, rounds and threads are 1 or more, workers 0 or more")
    args.rounds = 1 if args.quick else args.rounds
    args.device = device_for(args.device).type
    torch.set_num_threads(args.threads)
    name, measure = f"training-{args.stem}", training
    if args.curves or args.wait:
        name, measure = ("bf16", curves) if args.curves else ("waiting", waiting)
    keys = ("stem", "batch", "steps", "rounds", "threads", "workers", "device")
    result = {
        "environment": environment(device_for(args.device)), "settings": {key: getattr(args, key) for key in keys},
    }  # fmt: skip
    out = args.out or ROOT / "results" / f"{name}.json"
    with tempfile.TemporaryDirectory(prefix="inbatch-training-") as folder:
        result |= measure(args, Path(folder))
    write_json(out, result)
    if args.curves:
        plot(result, out.with_suffix(".png") if args.out else ROOT / "docs" / "bf16.png")
    say(f"Written to {out}")
    return result


if __name__ == "__main__":
    tune()
    main()
