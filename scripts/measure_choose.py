"""Train short runs with different settings, and record the measures without labels and k-NN of every checkpoint.

    python scripts/measure_choose.py          # writes results/choose.json; runs that it already has are kept

Six methods on 400 embedded digits in one thread. Learning rate, strength of the views, number of epochs and one setting
of the method are drawn by the number of the run. The features are evaluated after every epoch as in every run
(`make_online_evaluator`); at the end LiDAR is also measured with other numbers of images and views, and with the same
views for all runs. `python scripts/render_results.py` writes the tables of docs/choose.md.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch

from inbatch.api import prepare
from inbatch.data.views import Views, make_views
from inbatch.rng import permutation
from inbatch.runtime.environment import environment
from inbatch.training.build import RunComponents
from inbatch.training.holdout import evaluation_split
from inbatch.training.monitors.label_free import Chosen, embed_views, lidar_of, same_image
from inbatch.training.monitors.online_evaluation import choose_online_subsets, make_online_evaluator

FILE = Path(__file__).resolve().parents[1] / "results" / "choose.json"
RUNS = 6
"""Number of runs of a method."""
DRAWN = 10
"""Number of runs over which the values of a setting are equally frequent."""
COMMON: dict[str, list[Any]] = {
    "optimizer.lr": [2e-4, 6e-4, 2e-3, 6e-3, 2e-2],
    "views.strength": [0.0, 0.5, 1.0, 2.0],
    "epochs": [3, 6],
}
OWN: dict[str, dict[str, list[Any]]] = {
    "simclr": {"method.temperature": [0.05, 0.2, 1.0]},
    "moco": {"method.temperature": [0.05, 0.2, 1.0]},
    "byol": {"method.momentum": [0.9, 0.99, 0.999]},
    "simsiam": {"method.hidden_dim": [64, 128, 256]},
    "barlow": {"method.lambd": [0.0005, 0.0051, 0.05]},
    "vicreg": {"method.std_coeff": [5.0, 25.0, 50.0]},
}
"""Method -> settings of the method and their values."""
SIZES = [(100, 20), (100, 10), (100, 5), (100, 2), (50, 20), (50, 10), (50, 5), (25, 20), (25, 10)]
"""Numbers of images and views of the other estimates of LiDAR."""


def settings(method: str, number: int) -> dict[str, Any]:
    """Return the settings of a run; the values of a setting are about equally frequent over the runs of a method."""
    chosen = {}
    for place, (name, values) in enumerate((COMMON | OWN[method]).items()):
        order = permutation(sorted(OWN).index(method), place, DRAWN)
        chosen[name] = values[int(order[number]) % len(values)]
    return chosen


def train(method: str, number: int) -> dict[str, Any]:
    """Train a run, and return its settings, its curve and the estimates of its last checkpoint."""
    chosen = settings(method, number)
    fields: dict[str, Any] = {"subset": 400, "batch_size": 80, "epochs": chosen["epochs"], "seed": number}
    other = {key: value for key, value in chosen.items() if key != "epochs"}
    built = prepare("digits-canvas", method, device="cpu", settings=other, **fields)
    split = evaluation_split(built.recipe, built.source, "digits-canvas")
    assert split is not None
    online, _ = choose_online_subsets(built, split)
    evaluate, curve = make_online_evaluator(built, online), []
    began, evaluating, step = time.perf_counter(), 0.0, 0
    for epoch in range(built.recipe.epochs):
        losses = []
        for batch in built.loader.epoch(epoch):
            losses.append(float(built.step(batch, step)["loss"]))
            step += 1
        start = time.perf_counter()
        curve.append({"step": step, "epoch": epoch + 1, "loss": sum(losses) / len(losses)} | evaluate())
        evaluating += time.perf_counter() - start
    result = {"method": method, "number": number, "settings": chosen, "width": built.encoder.width, "curve": curve}
    seconds = {"all": time.perf_counter() - began, "evaluation": evaluating}
    return result | {"last": last(built)} | {"seconds": seconds, "command": built.recipe.command()}


def last(built: RunComponents) -> dict[str, Any]:
    """Return the estimates of LiDAR from the run's own views and from common ones, and `same_image` of the latter."""
    source = Chosen(built.loader.source, built.loader.held, 0)
    encoders, common = {"it": built.encoder}, make_views("digits", {"size": 20}, 1)
    own = embed_views(encoders, built.views, source, 0, 100, 20)["it"]
    views = Views(common, built.encoder.mean, built.encoder.std)
    shared = embed_views(encoders, views, source, 0, 100, 10)["it"]
    first, second, *_ = torch.nn.functional.normalize(shared, dim=2).unbind(1)
    return {
        "lidar": {f"{n} x {q}": lidar_of(own[torch.arange(n) * 100 // n, :q]) for n, q in SIZES},
        "lidar_common": lidar_of(shared),
        "same_image_common": same_image(first, second),
    }


def main() -> None:
    torch.set_num_threads(1)
    record = json.loads(FILE.read_text()) if FILE.exists() else {"runs": []}
    record["environment"] = environment(torch.device("cpu"))
    done = {(run["method"], run["number"]) for run in record["runs"]}
    for number in range(RUNS):
        for method in OWN:
            if (method, number) in done:
                continue
            record["runs"].append(run := train(method, number))
            FILE.write_text(json.dumps(record, indent=1) + "\n")
            figures = [f"{name} {value:.3g}" for name, value in run["curve"][-1].items()]
            print(method, number, f"{run['seconds']['all']:.1f} s", *figures, flush=True)


if __name__ == "__main__":
    main()
