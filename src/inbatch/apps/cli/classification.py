"""Commands for classifiers: train-classifier, predict."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from inbatch.apps.cli.app import (
    KINDS,
    SEEDS,
    Data,
    Device,
    ImageColumn,
    Json,
    LabelColumn,
    Quiet,
    Split,
    app,
    emit_result,
    report_errors,
    requested_output,
)
from inbatch.apps.cli.own_code import OwnEncoder
from inbatch.apps.console import print_table, say, warn
from inbatch.errors import listed, many, unreadable
from inbatch.runtime.path_list import joined_paths


@app.command(
    "train-classifier",
    epilog="Examples:\n\n  inbatch train-classifier runs/simclr-photos-1 ~/flowers -o flower-classifier\n\n"
    "  inbatch train-classifier runs/simclr-photos-1 ~/flowers --mode finetune -o flower-classifier\n\n"
    "  inbatch train-classifier runs/simclr-photos-1 labels.csv --label-fraction 0.1 --test ~/flowers-test -o few",
)
def train_classifier(
    run: Annotated[Path, Argument(metavar="RUN", help="Run directory, finished or stopped, or an exported encoder.")],
    out: Annotated[
        Path, Option("--out", "-o", metavar="FOLDER", help="Output folder, for model.safetensors and config.json.")
    ],
    data: Annotated[
        list[str] | None, Argument(metavar="[DATA...]", help=f"Labelled images; default: the run's. {KINDS}")
    ] = None,
    test: Annotated[
        list[str] | None, Option(help="Test images; default: the test split of the data, or a tenth of it.")
    ] = None,
    mode: Annotated[
        str, Option(metavar="probe|finetune", help="A linear layer on the features, or training of all weights.")
    ] = "probe",
    label_fraction: Annotated[float, Option(help="Fraction of the labels of every class to train on.")] = 1.0,
    probe: Annotated[
        str | None, Option(help="Training of the linear layer: auto (default), lbfgs, or a paper's: moco, ...")
    ] = None,
    tuning: Annotated[
        str | None, Option(help="Fine-tuning recipe: small (default), upright, simclr-1, simclr-10.")
    ] = None,
    seed: Annotated[int, Option(min=0, max=SEEDS, help="Seed of the choice of labels, and of the training.")] = 0,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    workers: Annotated[int, Option("--workers", "--num-workers", min=0, help="Processes that decode images.")] = 0,
    device: Device = "auto",
    encoder: OwnEncoder = None,
    as_json: Json = False,
) -> None:
    """Train a classifier on labelled images and write it with calibrated probabilities and figures per class."""
    with report_errors(as_json):
        from inbatch.api import train_classifier as train

        options: dict[str, Any] = {"mode": mode, "label_fraction": label_fraction, "probe": probe, "tuning": tuning}
        options |= {"seed": seed, "device": device, "workers": workers, "test": joined_paths(test) or None}
        options |= {"image_column": image_column, "label_column": label_column, "out": out}
        emit_result(lambda: train(run, joined_paths(data) or None, **options), as_json, print_classifier)


@app.command(
    epilog="Examples:\n\n  inbatch predict flower-classifier ~/photos -o predictions.csv\n\n"
    "  inbatch predict flower-classifier ~/photos -o predictions.parquet --top-k 3 --json",
)
def predict(
    classifier: Annotated[Path, Argument(metavar="CLASSIFIER", help="Folder that train-classifier wrote.")],
    data: Data,
    out: Annotated[Path, Option("--out", "-o", help="Output file, .csv, .jsonl or .parquet; replaced if it exists.")],
    top: Annotated[int, Option("--top-k", min=1, help="Number of classes per image.")] = 5,
    split: Split = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    device: Device = "auto",
    encoder: OwnEncoder = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the class of every image with its probability and the next classes; with labels, also print figures."""
    with report_errors(as_json):
        from inbatch.api import predict as classify

        options: dict[str, Any] = {"top": top, "split": split, "device": device, "quiet": quiet or as_json}
        options |= {"image_column": image_column, "label_column": label_column}
        file = requested_output(out)
        emit_result(lambda: classify(classifier, joined_paths(data), file, **options), as_json, print_predictions)


def print_classifier(result: dict[str, Any]) -> None:
    """Print the figures of a new classifier."""
    train, calibration = result["train"], result["calibration"]
    print_class_figures(result["test"])
    say("", f"Classifier: {result['classifier']} ({result['mode']}, {len(result['classes']):,} classes)")
    say(f"Trained on: {many(train['images'], 'image')} of {train['name']}")
    say(f"Judged by:  {many(result['test']['images'], 'image')}: {result['test']['held_out']}")
    before, after = calibration["before"], calibration["after"]
    if after is None:
        say(f"Calibrated: no, there are too few held-out images ({calibration['images']:,})")
    else:
        error = f"{before['calibration_error']:.1%} before, {after['calibration_error']:.1%} after"
        say(f"Calibrated: temperature {calibration['temperature']:.3g}; calibration error {error} (cross-fitted)")
    if result["note"]:
        say(f"Note:       {result['note']}")
    for part in ("train", "test"):
        _warn_unreadable(result[part].get("unreadable", []), f"left out ({part})")


def print_predictions(result: dict[str, Any]) -> None:
    """Print the number of images by predicted class, and the figures if the images are labelled."""
    if result["figures"] is None:
        counts = sorted(result["predicted"].items(), key=lambda item: -item[1])
        print_table(["class", "predicted"], [[name, f"{count:,}"] for name, count in counts[:MOST]], numbers=True)
        if len(counts) > MOST:
            say(f"and {len(counts) - MOST:,} more classes (--json prints all)")
    else:
        print_class_figures(result["figures"])
        if result["trained_on"]:
            warn(
                f"the split {listed(result['trained_on'])} has the names and labels of the training images: if these "
                "are the same images, the figures are too high"
            )
    say("", f"{many(result['images'], 'image')} classified into {result['out']}")
    if unknown := result["unknown_classes"]:
        say(
            f"Note: {many(sum(unknown.values()), 'image')} of classes that the classifier does not know, left out of "
            f"the figures: {listed(list(unknown))}"
        )
    _warn_unreadable(result["unreadable"], "left out")


MOST = 20
"""Largest number of classes in a table."""


def print_class_figures(result: dict[str, Any]) -> None:
    """Print accuracy, the classes with the lowest recall, and the pairs of classes that are confused most often."""
    classes = [(name, one) for name, one in result["per_class"].items() if one["images"]]
    classes.sort(key=lambda item: item[1]["recall"])

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    rows = [[n, f"{c['images']:,}", cell(c["recall"]), cell(c["precision"])] for n, c in classes[:MOST]]
    print_table(["class", "images", "recall", "precision"], rows, numbers=True)
    if len(classes) > MOST:
        say(f"and {len(classes) - MOST:,} more classes, none with a lower recall (--json prints all)")
    if result["confusions"]:
        say("")
        pairs = [
            [c["class"], c["predicted"], f"{c['images']:,}", f"{c['share']:.1%}"] for c in result["confusions"][:5]
        ]
        print_table(["class", "predicted as", "images", "of the class"], pairs)
    accuracy = f"{result['top1']:.1%} (top 5: {result['top5']:.1%})"
    say("", f"Accuracy:   {accuracy}, mean over the classes {result['balanced']:.1%}")


def _warn_unreadable(messages: list[str], what: str) -> None:
    if messages:
        warn(f"{unreadable(len(messages))} {what}: {'; '.join(messages[:3])}")
