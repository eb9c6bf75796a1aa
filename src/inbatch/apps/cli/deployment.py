"""Commands that hand an encoder over to other programs: export."""

from pathlib import Path
from typing import Annotated

from typer import Option

from inbatch.apps.cli.app import Json, RunFolder, app, deliver, reported
from inbatch.apps.cli.output import print_export


@app.command(
    epilog="Examples:\n\n  inbatch export runs/simclr-photos-1 -o encoder\n\n"
    "  inbatch export runs/simclr-photos-1 --to onnx -o encoder-onnx\n\n"
    "  inbatch export runs/simclr-photos-1 --to torchvision -o backbone --json\n\n"
    "  inbatch export runs/simclr-photos-1 --to hf -o card --license apache-2.0 --push USER/NAME",
)
def export(
    run: RunFolder,
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
    as_json: Json = False,
) -> None:
    """Write the encoder of a run, finished or stopped, to a folder for inbatch.load or another library.

    With --to, the other library opens the files, and its features are compared with the encoder's, before the folder
    appears.
    """
    with reported(as_json):
        from inbatch.api import export_run

        deliver(lambda: export_run(run, out, to, push_to=push, licence=license), as_json, print_export)
