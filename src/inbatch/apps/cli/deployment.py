"""Commands that hand an encoder over to other programs: export."""

from pathlib import Path
from typing import Annotated

from typer import Option

from inbatch.apps.cli.app import Json, RunFolder, app, reported
from inbatch.apps.cli.output import print_export
from inbatch.apps.console import print_json


@app.command(
    epilog="Examples:\n\n  inbatch export runs/simclr-photos-1 -o encoder\n\n"
    "  inbatch export runs/simclr-photos-1 -o encoder --json",
)
def export(
    run: RunFolder,
    out: Annotated[
        Path, Option("--out", "-o", metavar="FOLDER", help="Output folder, for model.safetensors and config.json.")
    ],
    as_json: Json = False,
) -> None:
    """Write the encoder of a run, finished or stopped, to a folder for inbatch.load and, if supported, timm."""
    with reported(as_json):
        from inbatch.api import export_run

        found = export_run(run, out)
        print_json(found) if as_json else print_export(found)
