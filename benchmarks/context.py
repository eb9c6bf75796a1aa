"""Cost of context plug-ins: python benchmarks/context.py [--device auto] [--sizes 32 224] [--batch 256]

Measure whole training steps of SimCLR (views, networks, loss, backward pass, optimiser) without and with every plug-in,
on random uint8 images in device memory. One round makes one step of each entry, so that changes of the machine's speed
affect all entries equally; reported are medians over the rounds, and their ratio to plain SimCLR in the same rounds.
Writes results/context-cost.json. On a few CPU cores use a smaller --batch and --encoder (tiny, resnet10); the output
contains them.

With random weights nearly every pair violates the rule of curation, which then makes as many redraws as its budget
allows: this is the worst case, reported with its rounds and redraws. "at a share" sets the margin so that only this
share of the first batch violates it before redrawing.
"""

import argparse
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inbatch.api import prepare
from inbatch.apps.console import print_table, say
from inbatch.batch import Batch
from inbatch.context.curation import pair_distances
from inbatch.runtime.device import device_for
from inbatch.runtime.environment import environment
from inbatch.runtime.files import write_json
from inbatch.training.build import RunComponents
from inbatch.training.size_estimate import estimate

OUT = Path(__file__).parents[1] / "results" / "context-cost.json"
PLAIN, GROUPS, SHARE = "simclr", "context batch/4", "curate, at a share"

ENTRIES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "fuse conv": {"fuse": "conv"},
    "fuse set": {"fuse": "set"},
    "attend ba2m": {"attend": "ba2m"},
    "attend batchformer": {"attend": "batchformer"},
    "attend se": {"attend": "se"},
    "curate": {"curate": "redraw"},
    SHARE: {"curate": "redraw"},
    "curate, strict": {"curate": "redraw", "curate.rule": "strict"},
    "crops intersection": {"crops": "intersection"},
    GROUPS: {"context": 4},
    f"{GROUPS}, shuffled": {"context": 4, "shuffle_groups": True},
}
"""Name -> settings in addition to the shared ones; `context` is the number of groups."""
AGAINST = {f"{GROUPS}, shuffled": GROUPS}
"""Second baseline of an entry, in addition to plain SimCLR."""
EPOCH, EPOCHS = 1, 100
"""Steps of the first curated epoch are measured."""


def assemble(name: str, args: argparse.Namespace, size: int, images: Tensor) -> RunComponents:
    """Return a run of the entry, ready for its first step."""
    words = {f"{key}.name" if key in ("fuse", "attend", "curate") else key: v for key, v in ENTRIES[name].items()}
    if "context" in words:
        words["context"] = args.batch // words["context"]
    if "curate.name" in words:
        words["curate.warmup"] = 0.0
    shared = {"image_size": size, "batch_size": args.batch, "encoder": args.encoder, "epochs": EPOCHS, "preset": "none"}
    settings = words | {"cache_on_device": True, "precision": args.precision}
    return prepare(images, "simclr", settings=settings, device=args.device, **shared)


def violate(built: RunComponents, batch: Batch, share: float) -> None:
    """Set the curator's margin so that about this share of a batch violates the pairwise rule before redrawing."""
    curator, distances = built.step.curator, []
    assert curator is not None

    def listen(x: Tensor, dim: int) -> Tensor:
        if dim == 1:
            distances.append(pair_distances(x, x, 0, curator.distance))
        return x

    curator(batch, listen)
    own, nearest = distances[0]
    curator.margin = -float((own - nearest).float().quantile(1 - share))


class Timed:
    """One entry: its parts, its batches, and the measurements of its steps."""

    def __init__(self, built: RunComponents) -> None:
        self.built, self.device = built, built.loader.device
        self.batches = list(built.loader.epoch(EPOCH))
        self.seconds: list[float] = []
        self.curation: list[dict[str, float]] = []
        self.peak = 0

    def step(self, number: int, kept: bool) -> None:
        """Make one training step; measure it if `kept`."""
        batch = self.batches[number % len(self.batches)]
        before = self._mark()
        begin = time.perf_counter()
        losses = self.built.step(batch, self.built.loader.steps * EPOCH)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - begin
        if kept:
            self.seconds.append(seconds)
            self.curation.append({name: float(x) for name, x in losses.items() if name.startswith("curate_")})
            if self.device.type == "cuda":
                self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device) - before)

    def _mark(self) -> int:
        """Return the bytes allocated before the step, of all entries."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)


def measure(args: argparse.Namespace, size: int) -> dict[str, dict[str, Any]]:
    """Measure every entry at one image size: seconds of a step, their ratio to plain, bytes."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2 * args.batch, 3, size, size), dtype=torch.uint8, generator=g)
    timed = {name: Timed(assemble(name, args, size, images)) for name in args.entries}
    if SHARE in timed:
        violate(timed[SHARE].built, timed[SHARE].batches[0], args.share)
    for number in range(args.warm + args.repeat):
        for entry in timed.values():
            entry.step(number, number >= args.warm)
    rows = {name: figures(entry) for name, entry in timed.items()}
    for name, row in rows.items():
        for key, other in (("ratio", PLAIN), ("ratio_to_groups", AGAINST.get(name))):
            if other in rows:
                row[key] = row["seconds"] / rows[other]["seconds"]
        if "curate" in row and PLAIN in rows:
            # The batch is embedded once, and redrawn samples again.
            passes = 1 + row["curate"]["redrawn"]
            row["curate"]["seconds_per_pass"] = (row["seconds"] - rows[PLAIN]["seconds"]) / passes
    return rows


def figures(entry: Timed) -> dict[str, Any]:
    """Return the figures of an entry."""
    quarters = statistics.quantiles(entry.seconds, n=4) if len(entry.seconds) > 1 else [entry.seconds[0]] * 3
    row: dict[str, Any] = {"seconds": statistics.median(entry.seconds), "quartiles": [quarters[0], quarters[2]]}
    memory = estimate(entry.built)["memory_bytes_estimate"]
    row["kept_bytes"] = memory["activations_of_a_group"] + memory["curator"]
    if entry.device.type == "cuda":
        row["peak_bytes"] = entry.peak
    if entry.curation[0]:
        names = ("rounds", "redrawn", "violating_before", "violating")
        row["curate"] = {name: statistics.mean(t[f"curate_{name}"] for t in entry.curation) for name in names}
    row["context"] = entry.built.context
    return row


def lines(rows: dict[str, dict[str, Any]]) -> Iterable[Sequence[str]]:
    """Yield the table rows of one size."""
    plain = rows.get(PLAIN)
    for name, row in rows.items():
        key = "peak_bytes" if "peak_bytes" in row else "kept_bytes"
        note = f"{row['ratio_to_groups']:.2f} of {AGAINST[name]}" if "ratio_to_groups" in row else ""
        if "curate" in row:
            c = row["curate"]
            note = f"{c['violating_before']:.0%} violate, {c['rounds']:.1f} rounds, {c['redrawn']:.2f} redraws/sample"
            if "seconds_per_pass" in c:
                note += f", {1e3 * c['seconds_per_pass']:,.1f} ms per pass of the batch"
        share = f"{row[key] / plain[key]:.2f}" if plain else ""
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        yield name, f"{1e3 * row['seconds']:,.1f}", ratio, f"{row[key] / 1e6:,.1f}", share, note


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224], help="sides of the images in pixels")
    parser.add_argument("--batch", type=int, default=256, help="samples per step, a multiple of 4")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--precision", default="auto", help="auto, float32 or bf16")
    parser.add_argument("--repeat", type=int, default=20, help="rounds that count")
    parser.add_argument("--warm", type=int, default=3, help="rounds before, that do not")
    parser.add_argument("--share", type=float, default=0.1, help="of samples that violate, for 'curate, at a share'")
    parser.add_argument("--entries", nargs="+", choices=ENTRIES, default=list(ENTRIES), metavar="NAME")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(words)
    if args.batch < 8 or args.batch % 4:
        parser.error("--batch is a multiple of 4, from 8 on: there are runs of 4 groups")
    if min(args.repeat, args.warm) < 1 or not 0 < args.share < 1:
        parser.error("--repeat and --warm are 1 or more, --share lies between 0 and 1")
    device = device_for(args.device)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "device", "entries")}
    result: dict[str, Any] = {"environment": environment(device), "settings": settings, "sizes": {}}
    kind = "peak of a step" if device.type == "cuda" else "kept for the way back"
    for size in args.sizes:
        rows = result["sizes"][str(size)] = measure(args, size)
        say(f"{args.encoder}, batch {args.batch}, {size} px, {device}, median of {args.repeat} steps")
        print_table(("", "ms / step", "ratio", f"MB {kind}", "ratio", ""), lines(rows), numbers=True)
        say("")
        write_json(args.out, result)
    say(f"Written to {args.out}")
    return result


if __name__ == "__main__":
    main()
