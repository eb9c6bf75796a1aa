"""Cost of a batch larger than memory: python benchmarks/large_batch.py DATA [--batch 16384] [--context 256]

Two parts, both real training steps of SimCLR and BYOL with ResNet-18 as `inbatch pretrain` makes them:
- steps: some steps of one large batch in groups; seconds, peak memory of the process, and the loss compared with a
  literal one on the same rows (float64, plain log-sum-exps of blocks of rows).
- cost: seconds per image of a batch in many groups, relative to those of a batch that is one group of that size, in
  whole steps: the cost of the second forward pass and of drawing views twice, less the optimiser's share, which occurs
  once a batch. One round makes two steps of one group, and one of many groups, which is longer.
Writes results/large-batch.json.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inbatch.api import prepare
from inbatch.apps.console import print_error, say
from inbatch.nn.functional import normalize
from inbatch.runtime.environment import environment
from inbatch.runtime.files import write_json
from inbatch.runtime.memory import peak_memory
from inbatch.training.build import RunComponents

OUT = Path(__file__).parents[1] / "results" / "large-batch.json"
BLOCK = 512
TOLERANCE = 1e-6
"""Tolerance of the loss against the literal one: float32 against float64."""


def prepare_run(args: argparse.Namespace, method: str, batch: int) -> RunComponents:
    """Return a run with the preset for CIFAR-10, ready for its first step."""
    words = {"batch_size": batch, "context": args.context, "preset": "cifar", "encoder": args.encoder, "epochs": 10}
    return prepare(args.data, method, device=args.device, **words)


def literal(z: Tensor, temperature: float) -> float:
    """Compute NT-Xent of the rows (V, N, D), V = 2, literally, in float64, some rows at a time."""
    u = normalize(z.double()).flatten(0, 1)
    n, total = len(u) // 2, 0.0
    for first in range(0, len(u), BLOCK):
        rows = torch.arange(first, min(first + BLOCK, len(u)))
        logits = u[rows] @ u.T / temperature
        positive = logits[torch.arange(len(rows)), (rows + n) % len(u)]
        logits[torch.arange(len(rows)), rows] = -torch.inf
        total += float((logits.logsumexp(1) - positive).sum())
    return total / len(u)


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """Measure steps of one large batch."""
    built = prepare_run(args, "simclr", args.batch)
    rows: list[Tensor] = []
    compute = built.method.loss

    def listen(online: Any, target: Any, batch: Any) -> Any:
        rows.append(online["projection"].detach().cpu())
        return compute(online, target, batch)

    built.method.loss = listen  # type: ignore[method-assign]
    result: dict[str, Any] = {"batch": args.batch, "context": built.context, "groups": built.step.groups}
    result |= {"precision": str(built.network.precision), "steps": []}
    for number, batch in enumerate(built.loader.epoch(0, stop=args.steps)):
        begin = time.perf_counter()
        loss = float(built.step(batch, number)["loss"])
        result["steps"].append({"seconds": time.perf_counter() - begin, "loss": loss})
        say(f"step {number}: loss {loss:.6f}, {result['steps'][-1]['seconds']:.0f} s")
    result["peak_process_bytes"] = peak_memory(torch.device("cpu"))
    if built.loader.device.type == "cuda":
        result["peak_device_bytes"] = peak_memory(built.loader.device)
    for step, z in zip(result["steps"], rows, strict=True):
        step["literal"] = literal(z, built.method.temperature)
    return result


def cost(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Return the seconds per image in groups, relative to those of one group."""
    many = args.context * args.groups
    built = {size: prepare_run(args, method, size) for size in (args.context, many)}
    batches = {size: next(iter(one.loader.epoch(0, stop=1))) for size, one in built.items()}
    seconds: dict[int, list[float]] = {size: [] for size in built}
    for number in range(1 + args.repeat):
        for size, one in built.items():
            for _ in range(1 if size == many else 2):
                begin = time.perf_counter()
                one.step(batches[size], number)
                if one.loader.device.type == "cuda":
                    torch.cuda.synchronize()
                if number:
                    seconds[size].append((time.perf_counter() - begin) / size)
    plain, grouped = (statistics.median(seconds[size]) for size in (args.context, many))
    result = {"context": args.context, "groups": args.groups, "rounds": args.repeat, "ratio": grouped / plain}
    return result | {"images_per_second": 1 / plain, "images_per_second_in_groups": 1 / grouped, "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--part", choices=["steps", "cost"], action="append")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    result: dict[str, Any] = {}
    if args.out.is_file():
        result = json.loads(args.out.read_text())
    parts = args.part or ["steps", "cost"]
    if "steps" in parts:  # first, because the peak is that of the whole process
        result["steps"] = steps(args)
    if "cost" in parts:
        result["cost"] = {method: cost(args, method) for method in ("simclr", "byol")}
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    result |= {"encoder": args.encoder, "environment": environment(device)}
    write_json(args.out, result)
    if "steps" in parts:
        one = result["steps"]
        say(f"batch {one['batch']:,} in {one['groups']} groups: most memory {one['peak_process_bytes'] / 1e9:.2f} GB")
        for i, s in enumerate(one["steps"]):
            say(f"step {i + 1}: loss {s['loss']:.6f}, literal {s['literal']:.6f}, {s['seconds']:.0f} s")
    for method, one in result.get("cost", {}).items():
        groups = f"{one['groups']} groups of {one['context']}"
        say(f"{method}: {groups} take {one['ratio']:.2f} times one group's time per image")
    off = [abs(s["loss"] - s["literal"]) / s["literal"] for s in result.get("steps", {}).get("steps", [])]
    if off and max(off) > TOLERANCE:
        print_error(f"a loss is {max(off):.1e} off its literal version")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
