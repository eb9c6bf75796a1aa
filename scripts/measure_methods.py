"""Train every method with one encoder and one budget.

    python scripts/measure_methods.py digits|cifar [ENTRY ...] [--data FOLDER] [--jobs N]

Each run is a separate process with one thread (`--jobs` of them at a time), for separate measurements of time and peak
memory. Writes results/methods/digits.json or cifar.json, entry by entry; entries that are not named are kept.
`python scripts/render_results.py` makes the tables.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1] / "results" / "methods"
UNTRAINED = "untrained encoder"

ENTRIES: dict[str, list[str]] = {
    "simclr": ["simclr"],
    "dcl": ["dcl"],
    "hcl": ["hcl"],
    "sogclr": ["sogclr"],
    "isogclr": ["isogclr"],
    "sigmoid": ["sigmoid"],
    "align_uniform": ["align_uniform"],
    "moco (v2)": ["moco", "method.layers=2"],
    "mocov3": ["mocov3"],
    "nnclr": ["nnclr"],
    "pcl (v2)": ["pcl", "method.layers=2"],
    "cc": ["cc"],
    "swav": ["swav"],
    "dino": ["dino"],
    "byol": ["byol"],
    "simsiam": ["simsiam"],
    "barlow": ["barlow"],
    "vicreg": ["vicreg"],
    "lejepa": ["lejepa"],
    "visreg": ["visreg"],
    "tico": ["tico"],
    "mmcr": ["mmcr"],
    "wmse (2 views)": ["wmse", "views.num_views=2"],
    "supcon (labels)": ["supcon"],
    "supervised (labels)": ["supervised"],
}
"""Name in the table -> method and settings."""
MANY_VIEWS = {
    "wmse (4 views)": ["wmse", "views.name=simclr_cifar", "views.num_views=4"],
    "swav (2 + 4 crops)": ["swav", "views.name=swav_cifar"],
}
"""On photographs only."""

# On photographs: the digits' small encoder, heads, optimiser and batch, for 2 epochs of 10,000 images.
PHOTOS = ["preset=digits", "subset=10000", "image_size=32", "knn_k=200", "epochs=2", "evaluate_every=2"]


def budget(kind: str) -> tuple[dict[str, list[str]], int]:
    """Name in the table -> method and settings, and how many seeds."""
    if kind == "digits":
        return {name: [*words, "epochs=30"] for name, words in ENTRIES.items()}, 3
    views = {"supervised": "views.name=supervised"}
    entries = {
        name: [*words, *PHOTOS, views.get(words[0], "views.name=simclr_cifar")] for name, words in ENTRIES.items()
    }
    return entries | {name: [*words, *PHOTOS] for name, words in MANY_VIEWS.items()}, 1


def run(data: str, words: list[str], seed: int) -> dict[str, Any]:
    """The result of a run in a process of its own."""
    method, *settings = words
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "inbatch", "pretrain", method, "--data", data, "--seed", str(seed), "--json"]
        command += ["--quiet", "--device", "cpu", "--out", f"{folder}/run"]
        for setting in settings:
            command += ["--set", setting]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    result = json.loads(done.stdout)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}, seed {seed}: {result['error']}")
    return result


def untrained(recipe: dict[str, Any], data: str, seed: int) -> dict[str, Any]:
    """What the encoder of a recipe is worth before its first step."""
    from inbatch.api import prepare
    from inbatch.evaluation import evaluate
    from inbatch.training.holdout import evaluation_split

    fields = {key: recipe[key] for key in ("subset", "image_size", "channels", "batch_size")}
    built = prepare(data, "simclr", settings={"encoder.name": recipe["encoder"]["name"]}, seed=seed, **fields)
    split = evaluation_split(built.recipe, built.source, data)
    assert split is not None
    return {
        "seed": seed,
        "evaluation": evaluate(built.encoder, split.bank, split.queries, k=recipe["knn_k"], seed=seed),
    }


def entry(results: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of the runs of an entry, one per seed."""
    shared = {key: results[0][key] for key in ("command", "recipe", "environment", "precision", "held_out")}
    own = ("evaluation", "curve", "collapsed", "leak", "training_seconds", "wall_seconds", "images_per_second")
    runs = [
        {"seed": result["recipe"]["seed"]} | {key: result[key] for key in (*own, "peak_memory_bytes")}
        for result in results
    ]
    return shared | {"runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budget", choices=["digits", "cifar"])
    parser.add_argument("entries", nargs="*", help="all by default")
    parser.add_argument("--data", default="digits-canvas-colour", help="for cifar: the folder of its images, relative")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    known, seeds = budget(args.budget)
    file = HERE / f"{args.budget}.json"
    entries: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        waiting = {
            name: [pool.submit(run, args.data, known[name], seed) for seed in range(seeds)]
            for name in args.entries or known
        }
        for name, futures in waiting.items():
            entries[name] = entry([future.result() for future in futures])
            if UNTRAINED not in entries:
                recipe = entries[name]["recipe"]
                entries[UNTRAINED] = {"runs": [untrained(recipe, args.data, seed) for seed in range(seeds)]}
            file.parent.mkdir(exist_ok=True)
            ordered = {key: entries[key] for key in (UNTRAINED, *known) if key in entries}
            file.write_text(json.dumps(ordered, indent=1) + "\n")
            print(name, [round(100 * one["evaluation"]["knn"]["top1"], 1) for one in entries[name]["runs"]], flush=True)


if __name__ == "__main__":
    main()
