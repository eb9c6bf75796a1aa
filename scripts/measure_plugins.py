"""Train with and without every plug-in, with the same seeds.

    python scripts/measure_plugins.py digits|cifar [QUESTION ...] [--data FOLDER]

Questions: fusion (Table 3 of BA-SSL), crops and curation (Tables 1 and 2 of batch curation), attention (BA2M); on
the digits also defaults (fusion's, as in fusion-defaults.json).
Uses the runs of `measure_methods.py`, with three seeds each; writes results/plugins/digits.json or cifar.json, entry by
entry, and skips existing entries. `python scripts/render_results.py` makes the tables.
"""

import argparse
import concurrent.futures
import json
from pathlib import Path
from typing import Any

from measure_methods import UNTRAINED, entry, run, untrained

HERE = Path(__file__).resolve().parents[1] / "results" / "plugins"
SEEDS = 3

FUSED = {"off": [], "conv": ["fuse.name=conv"], "set": ["fuse.name=set"]}
METHODS = {"moco v2": ["moco", "method.layers=2"], "byol": ["byol"], "simclr": ["simclr"], "simsiam": ["simsiam"]}
CROPS = ("default", "global-local", "adjacent", "intersection", "equal", "big", "small", "global-local-big")
CROPPED = ["simclr", "views.name=simclr_cifar"]
_UNBOUNDED = ["curate.name=redraw", "curate.budget=null", "curate.rule=strict"]
CURATED = {"pairwise, budget 0.5": ["curate.name=redraw"], "strict, no budget": _UNBOUNDED}
DEFAULTS = ("conv relu", "conv where=before", "conv where=before relu", "conv bottleneck=1", "conv layers=2",
            "conv remember=all")  # fmt: skip
RESNET = ["encoder.name=resnet10", "encoder.stem=imagenet", "views.name=supervised"]
ATTENDS = ("none", "se", "cbam", "ba2m")


def questions(kind: str) -> dict[str, dict[str, list[str]]]:
    """Question -> name in the table -> method and settings."""
    more = ("eca", "batchformer") if kind == "digits" else ()
    encoder = RESNET if kind == "cifar" else []
    table = {
        "fusion": {f"{m}, {f}": [*words, *plug] for m, words in METHODS.items() for f, plug in FUSED.items()},
        "crops": {name: [*CROPPED, f"crops={name}"] for name in CROPS},
        "curation": {name: [*CROPPED, *words] for name, words in CURATED.items()},
        "attention": {
            name: ["supervised", *encoder, *([] if name == "none" else [f"attend.name={name}"])]
            for name in (*ATTENDS, *more)
        },
    }  # fmt: skip
    if kind == "digits":
        table["defaults"] = {name: ["simclr", *_fusion(*name.split())] for name in DEFAULTS}
    return {q: {name: shared(kind, words) for name, words in entries.items()} for q, entries in table.items()}


def _fusion(name: str, *options: str) -> list[str]:
    return [f"fuse.name={name}", *(f"fuse.{option}" if "=" in option else f"fuse.{option}=true" for option in options)]


def shared(kind: str, words: list[str]) -> list[str]:
    """The budget of all entries: the digits' small encoder and batch of 128."""
    if kind == "digits":
        return [*words, "epochs=12"]
    views = [] if any(word.startswith("views.name") for word in words) else ["views.name=simclr_cifar"]
    photos = ["preset=digits", "subset=10000", "image_size=32", "knn_k=200", "epochs=2", "evaluate_every=2"]
    return [*words, *photos, *views]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budget", choices=["digits", "cifar"])
    parser.add_argument("questions", nargs="*", help="all by default")
    parser.add_argument("--data", default="digits-canvas-colour", help="for cifar: the folder of its images, relative")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    known, file = questions(args.budget), HERE / f"{args.budget}.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        waiting = {
            (question, name): [pool.submit(run, args.data, known[question][name], seed) for seed in range(SEEDS)]
            for question in args.questions or known
            for name in known[question]
            if name not in record.get(question, {})
        }
        for (question, name), futures in waiting.items():
            results = [future.result() for future in futures]
            record.setdefault(question, {})[name] = entry(results)
            if UNTRAINED not in record:
                recipe = results[0]["recipe"]
                record[UNTRAINED] = {"runs": [untrained(recipe, args.data, seed) for seed in range(SEEDS)]}
            HERE.mkdir(exist_ok=True)
            file.write_text(json.dumps(record, indent=1) + "\n")
            knn = [round(100 * one["evaluation"]["knn"]["top1"], 1) for one in record[question][name]["runs"]]
            print(question, name, knn, flush=True)


if __name__ == "__main__":
    main()
