"""Measure whether a plug-in leaks its context group.

    python scripts/measure_leak.py --data FOLDER       # writes results/leak.json

SimCLR on 4,000 photographs in four context groups of 32, one epoch, three seeds, the digits' small encoder; then
`context_leak.leak` is measured on the projections of 16 groups of 32, before and after. "off" is batch norm alone.
"""

import argparse
import json
from pathlib import Path

import torch

from inbatch.api import prepare
from inbatch.runtime.environment import environment
from inbatch.training.monitors.context_leak import leak

ENTRIES = {
    "off": {},
    "fuse set": {"fuse": "set"},
    "fuse set, shuffled": {"fuse": "set", "shuffle_groups": True},
    "fuse conv": {"fuse": "conv"},
    "attend ba2m": {"attend": "ba2m"},
    "attend batchformer": {"attend": "batchformer"},
}
SEEDS = 3


def measure_leak(data: str, plugs: dict[str, object], seed: int) -> dict[str, dict[str, float]]:
    """Return the leak of a new network, and of the same network after an epoch."""
    fields = {"preset": "digits", "subset": 4000, "image_size": 32, "context": 32, "epochs": 1, "seed": seed} | plugs
    built = prepare(data, "simclr", settings={"views.name": "simclr_cifar"}, device="cpu", **fields)
    before = leak(built, 1)
    for step, batch in enumerate(built.loader.epoch(0)):
        built.step(batch, step)
    return {"before": before, "after": leak(built, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder of the images")
    data = parser.parse_args().data
    entries = {name: [measure_leak(data, plugs, seed) for seed in range(SEEDS)] for name, plugs in ENTRIES.items()}
    result = {"environment": environment(torch.device("cpu")), "entries": entries}
    (Path(__file__).resolve().parents[1] / "results" / "leak.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
