"""Write the encoder of a finished run into weights/NAME, in bf16, with the record of how it was made.

    python scripts/ship_weights.py RUN NAME --data DATA --terms "TERMS OF THE DATA" [--other NAME=DATA ...]

The record contains command, curve, seed, versions, figures of the shipped weights on all images of DATA (k-NN, probe,
clusters, few labels), a linear probe on the other data, and the hash of the file. The weights are rounded to bf16 only
if k-NN and probe then differ by less than 0.1 points; else they are stored in float32.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from inbatch.api import load
from inbatch.apps.console import say
from inbatch.models import Encoder, save_encoder
from inbatch.runtime.files import read_json, write_json

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
PROTOCOLS = "knn,linear,clustering,few"
LOSS = 0.001
"""Largest difference of k-NN and probe, as a share of 1, at which weights are shipped in bf16."""
KEPT = ("command", "recipe", "environment", "images", "steps", "training_seconds", "training_cpu_seconds", "curve")


def evaluate(folder: Path, data: Path, *words: str) -> dict[str, Any]:
    """Return the figures of `inbatch evaluate` for the encoder in a folder."""
    line = [sys.executable, "-m", "inbatch", "evaluate", str(folder), "--data", str(data), "--device", "cpu", *words]
    result: dict[str, Any] = json.loads(subprocess.run([*line, "--json"], stdout=subprocess.PIPE, check=True).stdout)
    return result


def rounded(run: Path) -> Encoder:
    """Return the encoder of a run with the weights of its layers in bf16; biases and statistics stay in float32."""
    encoder = load(run)
    for weight in encoder.backbone.parameters():
        if weight.ndim > 1:
            weight.data = weight.data.to(torch.bfloat16)
    return encoder


def figures(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of an evaluation that are part of the record."""
    names = ("train", "test", "knn", "linear", "clustering", "untrained", "few")
    return {name: evaluation[name] for name in names if name in evaluation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--terms", required=True, help="terms of the data, one sentence")
    parser.add_argument("--other", action="append", default=[], metavar="NAME=DATA", help="data of a linear probe")
    args = parser.parse_args()
    others = [other.partition("=") for other in args.other]
    result, folder = read_json(args.run / "result.json"), WEIGHTS / args.name
    save_encoder(load(args.run), folder)
    exact = result["evaluation"]
    with tempfile.TemporaryDirectory() as name:
        trial = Path(name) / "run"
        trial.mkdir()
        for file in ("recipe.json", "result.json", "run.json", "initial"):
            if (args.run / file).exists():
                (trial / file).symlink_to((args.run / file).resolve())
        save_encoder(rounded(args.run), trial / "encoder")
        evaluation = figures(evaluate(trial, args.data, "--protocol", PROTOCOLS))
        lost = [exact[part]["top1"] - evaluation[part]["top1"] for part in ("knn", "linear")]
        if max(map(abs, lost)) < LOSS:
            save_encoder(rounded(args.run), folder)
        else:
            save_encoder(load(args.run), trial / "encoder")
            evaluation = figures(evaluate(trial, args.data, "--protocol", PROTOCOLS))
        transfer = {}
        for what, _, place in others:
            linear = evaluate(trial, Path(place), "--protocol", "linear")["linear"]
            transfer[what] = {name: linear[name] for name in ("top1", "top5", "probe", "c", "normalisation")}
    source = args.data.resolve().name
    record = {name: result[name] for name in KEPT if name in result}
    record |= {
        "command": str(record["command"]).replace(str(args.data), source),
        "recipe": record["recipe"] | {"data": source}, "seed": record["recipe"]["seed"],
        "versions": record["environment"]["versions"], "data": {"name": source, "terms": args.terms},
        "licence": "Apache-2.0", "precision": "bf16" if max(map(abs, lost)) < LOSS else "float32",
        "lost_by_bf16": dict(zip(("knn", "linear"), lost, strict=True)), "evaluation": evaluation, "transfer": transfer,
        "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    }  # fmt: skip
    for where, name in ((str(args.data), source), *((place, what) for what, _, place in others)):
        record = json.loads(json.dumps(record).replace(json.dumps(where)[1:-1], name))  # no path of this machine
    write_json(folder / "record.json", record)
    say(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.2f} MB, {record['precision']}")
    say(f"k-NN {evaluation['knn']['top1']:.2%}, probe {evaluation['linear']['top1']:.2%}; lost by bf16: {lost}")


if __name__ == "__main__":
    main()
