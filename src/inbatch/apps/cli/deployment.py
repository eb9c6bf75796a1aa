"""Commands that hand an encoder or a classifier over to other programs: export."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from inbatch.apps.cli.app import Json, app, emit_result, report_errors
from inbatch.apps.cli.output import size_text
from inbatch.apps.cli.own_code import OwnEncoder
from inbatch.apps.console import say


@app.command(
    epilog="Examples:\n\n  inbatch export runs/simclr-photos-1 -o encoder\n\n"
    "  inbatch export runs/simclr-photos-1 --to onnx -o encoder-onnx\n\n"
    "  inbatch export runs/simclr-photos-1 --to torchvision -o backbone --json\n\n"
    "  inbatch export flower-classifier --to onnx -o flower-onnx\n\n"
    "  inbatch export runs/simclr-photos-1 --to hf -o card --license apache-2.0 --push USER/NAME",
)
def export(
    run: Annotated[
        Path,
        Argument(metavar="RUN", help="A run, finished or stopped, or the folder of an encoder or classifier."),
    ],
    out: Annotated[
        Path, Option("--out", "-o", metavar="FOLDER", help="Output folder; a previous export in it is replaced.")
    ],
    to: Annotated[
        str | None,
        Option(
            metavar="TARGET",
            help="timm, torchvision, hf, onnx, torch or coreml-ready; default: model.safetensors and config.json for "
            "inbatch.load and, if supported, timm.",
        ),
    ] = None,
    push: Annotated[
        str | None, Option(metavar="USER/NAME", help="With hf: upload the folder to this repository of the hub.")
    ] = None,
    license: Annotated[
        str | None, Option("--license", help="With hf: licence of the weights in the model card, such as apache-2.0.")
    ] = None,
    encoder: OwnEncoder = None,
    as_json: Json = False,
) -> None:
    """Write the encoder of a run, finished or stopped, to a folder for inbatch.load or another library.

    With --to, the other library opens the files, and its features are compared with the encoder's, before the folder
    appears. A folder of train-classifier is exported with its probabilities to onnx, torch and timm.
    """
    with report_errors(as_json):
        from inbatch.api import export_run

        emit_result(lambda: export_run(run, out, to, push_to=push, licence=license), as_json, print_export)


def print_export(result: Mapping[str, Any]) -> None:
    """Print what was exported, its location, the comparison in the other library, and how to load it."""
    image = f"{result['encoder']}, {result['channels']}x{result['size']}x{result['size']}"
    if "classes" in result:
        say(f"Classifier: {image} -> {len(result['classes']):,} classes", f"Written to: {result['out']}")
    else:
        say(f"Encoder:    {image} -> {result['width']}", f"Written to: {result['out']}")
    if "check" in result:
        _print_check(result)
    say(*([f"Pushed to:  {result['pushed']}"] if "pushed" in result else []))
    say(*([f"Note:       {result['note']}"] if result["note"] else []))
    if "load" in result:
        say("", "To load it:", "", f"  {result['load']}")
        return
    say("", "In Python:", "", f"  inbatch.load({result['out']!r})")
    if result["timm"]:
        say(f"  timm.create_model({'local-dir:' + result['out']!r}, pretrained=True)")


def _print_check(result: Mapping[str, Any]) -> None:
    """Print the files of an export, and how much their features or probabilities differ."""
    check, features = result["check"], result.get("features")
    rows, largest = ("features", "feature") if features else ("probabilities", "probability")
    kind = f" (the largest is {check[f'largest_{largest}']:.2g})"
    if features and features["as"] != "embed":
        kind += f"; they are {features['number']}, {features['as']}"
    say(*(f"            {name}, {size_text(file['bytes'])}" for name, file in result["files"].items()))
    say(f"Checked by: {check['library']}: {rows} differ by at most {check['max_difference']:.1e}{kind}")
