"""Train SimCLR on the embedded digits with and without each rule of mixing, with the same seeds.

    python scripts/measure_mixing.py

Five runs for each of three seeds, of 4 epochs (40 steps of 128 images), in one process and one thread; k-NN and a
linear probe on the 500 test images. Writes results/mixing-digits.json and skips existing entries.
`python scripts/render_results.py` makes the table of docs/context/mix.md.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch

from inbatch import api
from inbatch.evaluation import evaluate
from inbatch.runtime.environment import environment
from inbatch.training.holdout import evaluation_split

FILE = Path(__file__).resolve().parents[1] / "results" / "mixing-digits.json"
RULES, SEEDS, EPOCHS = (None, "imix", "cutmix", "mixco", "unmix"), 3, 4


def measure(mix: str | None, seed: int) -> dict[str, Any]:
    """Return seed, accuracies and the processor time of the training of one run."""
    began, number = time.process_time(), 0
    built = api.prepare("digits-canvas", "simclr", epochs=EPOCHS, seed=seed, device="cpu", mix=mix)
    for epoch in range(EPOCHS):
        for batch in built.loader.epoch(epoch):
            built.step(batch, number)
            number += 1
    seconds = time.process_time() - began
    split = evaluation_split(built.recipe, built.source, "digits-canvas")
    assert split is not None
    how: dict[str, Any] = {"k": built.recipe.knn_k, "seed": seed, "protocols": ("knn", "linear")}
    result = evaluate(built.encoder, split.bank, split.queries, **how)
    accuracy = {key: result[key]["top1"] for key in ("knn", "linear")}
    return {"seed": seed, "steps": number, "cpu_seconds": round(seconds, 1)} | accuracy


def main() -> None:
    torch.set_num_threads(1)
    record = json.loads(FILE.read_text()) if FILE.exists() else {"environment": environment(torch.device("cpu"))}
    entries = record.setdefault("entries", {})
    for seed in range(SEEDS):
        for mix in RULES:
            runs = entries.setdefault(mix or "off", {"runs": []})["runs"]
            if seed not in [run["seed"] for run in runs]:
                runs.append(measure(mix, seed))
                FILE.write_text(json.dumps(record, indent=1) + "\n")
                print(mix or "off", runs[-1], flush=True)


if __name__ == "__main__":
    main()
