"""Time to reach a k-NN accuracy on CIFAR-10, by lightly's benchmark recipe and by inbatch.

    python benchmarks/time_to_accuracy.py --data cifar10-jpeg --who lightly --target 0.5 --out lightly.json
    python benchmarks/time_to_accuracy.py --data cifar10-jpeg --who inbatch --command "simclr --epochs 20" \\
        --target 0.5 --out inbatch.json
    python benchmarks/time_to_accuracy.py --draw lightly.json inbatch.json --out results/time-to-accuracy.json \\
        --figure docs/time-to-accuracy.png

--data contains train.parquet and test.parquet. Only training is timed, as wall time and as CPU seconds over all
threads; evaluations and checkpoints are not. An evaluation measures the encoder (before the head) by weighted k-NN, k
200, temperature 0.1; every entry of the curve contains the numbers of images of the bank and of the queries. The target
is reached at the first evaluation that finds it. If killed or interrupted, the same command resumes from the folder
named like --out without .json, and the file is written continuously.

lightly: SimCLR as in its docs/source/getting_started/benchmarks/cifar10_benchmark.py, in float32, from its own parts
and torch's DataLoader, by a plain loop instead of pytorch-lightning's trainer, and without worker processes, so that
every CPU second is counted. Ends at the target, unless --past-target is given. The queries are the whole test set. The
bank is the whole training set if an evaluation then costs less than a tenth of --every-seconds or the accuracy is near
the target, otherwise its first 10,000 images.
inbatch: `inbatch pretrain` with the arguments of --command, any settings, to its end. Its recipe sets the evaluations;
work before the first step (reading, decoding, choosing a recipe for a budget) is not counted either.
"""

import argparse
import copy
import math
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from inbatch.apps.bench import peer_workloads
from inbatch.apps.bench.accuracy import entries, flags, markdown, plot_curves, reached, together
from inbatch.apps.bench.reference_workloads import MEAN, STD, Encoded
from inbatch.apps.bench.synthetic_data import labelled
from inbatch.apps.console import say
from inbatch.errors import ConfigError, DataError, InbatchError, Interrupted, Preempted
from inbatch.evaluation import knn_scores
from inbatch.runtime.environment import environment
from inbatch.runtime.files import locked, read_json, write_json
from inbatch.runtime.memory import threads
from inbatch.runtime.signals import Stop, stop_on_signals
from inbatch.training.checkpoint import LAST, load, save

RECIPE = {
    "method": "SimCLR", "encoder": "ResNetGenerator resnet-18", "head": "512-512-128", "batch": 128,
    "temperature": 0.5, "optimizer": "sgd", "lr": 0.06, "momentum": 0.9, "weight_decay": 5e-4,
    "schedule": "cosine by epochs", "epochs": 200, "precision": "float32", "workers": 0, "seed": 0,
    "views": "SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0)",
    "source": "lightly, docs/source/getting_started/benchmarks/cifar10_benchmark.py",
    "trainer": "a plain loop in place of pytorch-lightning's",
}  # fmt: skip
"""lightly's recipe as published, except for the trainer and the workers; the learning rate is 0.06 * batch / 128."""
FIRST = 10_000
"""Images of the bank of a fast evaluation."""
NEAR = 0.1
"""Distance to the target from which the whole bank is used."""
SAVE_SECONDS = 180.0
"""Wall time between two checkpoints."""

Images = tuple[list[bytes], Tensor]
"""Encoded files and their labels."""


def seeded(*numbers: int) -> None:
    """Seed every random number generator with these numbers, so that a step is the same after a kill."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@torch.no_grad()
def features(encoder: nn.Module, files: list[bytes]) -> Tensor:
    """Return the encoder's features of clean images, with the preprocessing of lightly's benchmark."""
    from torchvision import transforms

    clean = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    seeing = copy.deepcopy(encoder).eval().to(memory_format=torch.channels_last)  # the fastest layout
    loader = torch.utils.data.DataLoader(Encoded(files, clean), 32)
    return torch.cat([seeing(images.contiguous(memory_format=torch.channels_last)) for images, _ in loader])


def look(encoder: nn.Module, train: Images, test: Images, target: float, every: float) -> dict[str, Any]:
    """Return the k-NN accuracy, the sizes of the bank and of the queries, and the CPU seconds of the evaluation."""
    began, whole = time.process_time(), len(train[0])
    queries, bank = features(encoder, test[0]), features(encoder, train[0][:FIRST])

    def accuracy() -> float:
        labels, classes = train[1][: len(bank)], int(train[1].max()) + 1
        scores = knn_scores(queries, bank, labels, classes, k=min(200, len(bank)), temperature=0.1)
        return float((scores.argmax(1) == test[1]).double().mean())

    top1 = accuracy()
    cost = (time.process_time() - began) * (len(test[0]) + whole) / (len(test[0]) + len(bank))
    if len(bank) < whole and (cost < every / 10 or top1 >= target - NEAR):
        bank = torch.cat([bank, features(encoder, train[0][len(bank) :])])
        top1 = accuracy()
    result = {"knn": top1, "bank": len(bank), "queries": len(queries)}
    return result | {"look_cpu_seconds": time.process_time() - began}


@dataclass
class Lightly:
    """Training by lightly's recipe: model and optimiser, progress, time used, and the curve."""

    train: Images
    threads: int
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        seeded(RECIPE["seed"])
        self.model = peer_workloads.network({"library": "lightly"})
        learn = {key: RECIPE[key] for key in ("lr", "momentum", "weight_decay")}
        self.optimizer = torch.optim.SGD(self.model.parameters(), **learn)
        self.criterion = peer_workloads.criterion("lightly", RECIPE["temperature"])
        self.data = Encoded(self.train[0], peer_workloads.TRANSFORMS["lightly"](32))
        self.steps = len(self.data) // RECIPE["batch"]
        if not self.steps:
            raise DataError(f"{len(self.data)} images are fewer than a batch of {RECIPE['batch']}: give more images")
        self.total = self.steps * RECIPE["epochs"]
        self.setup = {"recipe": RECIPE, "images": len(self.data), "threads": self.threads}

    def views(self) -> Iterator[Any]:
        """Yield batches of two views from this step on; the random numbers of a step depend only on its number."""
        begin = self.step
        for step in range(begin, self.total):
            epoch, at = divmod(step, self.steps)
            if at == 0 or step == begin:
                order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(epoch))
                rows = order[: self.steps * RECIPE["batch"]].view(self.steps, -1)[at:].tolist()
                loader = iter(torch.utils.data.DataLoader(self.data, batch_sampler=rows))
            seeded(RECIPE["seed"], step)
            yield next(loader)[0]

    def learn(self, views: Iterator[Any]) -> None:
        """Make one step, timed from the files to the weights."""
        wall, cpu = time.perf_counter(), time.process_time()
        done = self.step // self.steps / RECIPE["epochs"]
        self.optimizer.param_groups[0]["lr"] = RECIPE["lr"] * (1 + math.cos(math.pi * done)) / 2
        first, second = next(views)
        loss = self.criterion(self.model(first), self.model(second))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        self.step += 1
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu

    def due(self, every: float) -> bool:
        """Return whether an evaluation is due; at the end one always is."""
        last = self.curve[-1] if self.curve else {"images": 0, "cpu_seconds": 0.0}
        long_ago = self.cpu_seconds - last["cpu_seconds"] >= every or self.step == self.total
        return long_ago and self.step * RECIPE["batch"] > last["images"]

    def judge(self, test: Images, target: float, every: float) -> None:
        """Evaluate, and add the result to the curve."""
        mean = sum(self.losses) / len(self.losses)
        entry = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "images": self.step * RECIPE["batch"]}
        entry |= {"epoch": self.step / self.steps, "loss": mean}
        self.curve.append(entry | look(self.model[:-1], self.train, test, target, every))
        self.losses = []

    def save(self, folder: Path) -> None:
        clock = [self.seconds, self.cpu_seconds]
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "clock": clock}
        save(folder, state | {"losses": self.losses, "entries": self.curve, "told": self.setup}, step=self.step)

    def restore(self, folder: Path) -> str:
        """Resume from the folder's checkpoint; return a message. ConfigError if it belongs to another run."""
        checkpoint = load(folder)
        state = checkpoint.state
        if state["told"] != self.setup:
            raise ConfigError(f"{folder} holds another run ({state['told']}, not {self.setup}): choose another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.curve, self.step = state["losses"], state["entries"], checkpoint.step
        self.seconds, self.cpu_seconds = state["clock"]
        return checkpoint.note or f"Resuming from step {self.step:,}, {self.cpu_seconds:,.0f} s of the processor."


def write(args: argparse.Namespace, curve: list[dict[str, Any]], images: int, **fields: Any) -> dict[str, Any]:
    """Write the current results, and return them."""
    words = ["python", "benchmarks/time_to_accuracy.py", "--who", args.who, "--target", f"{args.target:g}"]
    words += ["--threads", str(args.threads)] + (["--label", args.label] if args.label else [])
    words += ["--command", args.command] if args.command else ["--every-seconds", f"{args.every_seconds:g}"]
    result = {"who": args.label or args.who, "command": shlex.join(words), "target": args.target, "images": images}
    result |= {"reached": reached(curve, args.target), "environment": args.environment, **fields, "curve": curve}
    write_json(args.out, result)
    return result


def lightly(args: argparse.Namespace, stop: Stop) -> dict[str, Any]:
    """Train by lightly's recipe until the target, the limit of hours, the last epoch or a signal."""
    folder, test = args.out.with_suffix(""), labelled(args.data / "test.parquet")
    ends, saved = time.perf_counter() + 3600 * args.hours, time.perf_counter()
    with locked(folder):
        run = Lightly(labelled(args.data / "train.parquet"), args.threads)
        if (folder / LAST).exists():
            say(run.restore(folder))
        views = run.views()
        while True:
            if run.due(args.every_seconds):
                run.save(folder)  # evaluations take long
                run.judge(test, args.target, args.every_seconds)
                last, saved = run.curve[-1], 0.0
                say(
                    f"{last['cpu_seconds']:,.0f} s, epoch {last['epoch']:.2f}: k-NN {last['knn']:.1%}, {last['bank']:,}"
                )
            there = reached(run.curve, args.target) and not args.past_target
            ended = there or stop.requested or time.perf_counter() >= ends or run.step == run.total
            if ended or time.perf_counter() - saved >= SAVE_SECONDS:
                run.save(folder)
                progress = {"step": run.step, "seconds": run.seconds, "cpu_seconds": run.cpu_seconds}
                result = write(args, run.curve, len(run.data), recipe=RECIPE, **progress)
                saved = time.perf_counter()
            if ended:
                return result
            run.learn(views)


def inbatch(args: argparse.Namespace, stop: Stop) -> dict[str, Any]:
    """Run inbatch to its end, the limit of hours or a signal, and write its curve continuously."""
    from pyarrow.parquet import ParquetFile

    folder, ends = args.out.with_suffix(""), time.perf_counter() + 3600 * args.hours
    line = [sys.executable, "-m", "inbatch", "pretrain", *shlex.split(args.command), "--data", str(args.data)]
    line += ["--out", str(folder), "--resume", "auto"]
    environ = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    child, code = subprocess.Popen(line, env=environ), None
    count = ParquetFile(args.data / "train.parquet").metadata.num_rows
    while code is None:
        try:
            code = child.wait(5)
        except subprocess.TimeoutExpired:
            if stop.requested or time.perf_counter() >= ends:
                child.terminate()  # it saves a checkpoint
        recipe = read_json(folder / "recipe.json") if (folder / "recipe.json").exists() else {}
        used = min(count, recipe.get("subset") or count)
        result = write(args, entries(folder, used), used, recipe=recipe)
    if code not in (0, Preempted.exit_code, Interrupted.exit_code):
        raise InbatchError(f"inbatch pretrain ended with {code}; what it said stands above")
    return result


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with train.parquet and test.parquet")
    parser.add_argument("--who", choices=("lightly", "inbatch"))
    parser.add_argument("--target", type=float, default=0.5, help="k-NN accuracy, a share of 1")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file: the curve, or with --draw all of them")
    parser.add_argument("--threads", type=int, default=threads())
    parser.add_argument("--hours", type=float, default=math.inf, help="wall time of this call")
    parser.add_argument("--every-seconds", type=float, default=300.0, help="lightly: processor time between two looks")
    parser.add_argument("--past-target", action="store_true", help="lightly: go on when the target is reached")
    parser.add_argument("--command", default="", help='inbatch: method, preset, settings, as in "simclr --epochs 20"')
    parser.add_argument("--label", help="what the curve is called in table and figure; who it is by default")
    parser.add_argument("--draw", type=Path, nargs="+", metavar="CURVE", help="put curves together, the slower first")
    parser.add_argument("--figure", type=Path, help="with --draw: the picture")
    args = parser.parse_args(words)
    if args.draw:
        comparison = together(args.draw)
        write_json(args.out, comparison)
        if args.figure:
            plot_curves(comparison, args.figure)
        say(markdown(comparison))
        return comparison
    if args.who is None or args.data is None:
        parser.error("say with --data and --who what to train, or with --draw which curves to draw")
    if args.out.suffix != ".json":
        parser.error(f"--out {args.out} has to end in .json: the folder of the run gets the name without it")
    torch.set_num_threads(args.threads)
    args.environment = environment(torch.device("cpu")) | {"flags": flags()}
    if args.who == "lightly":
        args.environment["lightly"] = version("lightly")
    with stop_on_signals() as stop:
        return lightly(args, stop) if args.who == "lightly" else inbatch(args, stop)


if __name__ == "__main__":
    main()
