"""The command that continues the training of existing weights: adapt."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from inbatch.apps.cli.app import (
    Data,
    Device,
    ImageColumn,
    Json,
    LabelColumn,
    Quiet,
    Set,
    app,
    assignments,
    emit_result,
    report_errors,
)
from inbatch.apps.cli.output import MEASURES
from inbatch.apps.cli.own_code import typed
from inbatch.apps.console import print_error, print_table, say
from inbatch.errors import many
from inbatch.runtime.path_list import joined_paths


@app.command(
    epilog="Examples:\n\n  inbatch adapt ~/photos --from timm/vit_small_patch16_dinov3 -o adapted\n\n"
    "  inbatch adapt ~/photos --from runs/simclr-photos-1 --budget 30m -o adapted\n\n"
    "  inbatch adapt ~/photos --from weights.safetensors --encoder resnet50 --method moco --seeds 5\n\n"
    "  inbatch embed adapted ~/photos -o features.parquet     with the recommended weights\n\n"
    "Exit codes: 0 helped, or not shown (the verdict says which); 4 did not help. The same command with the "
    "same -o continues an adaptation that was interrupted.",
)
def adapt(
    data: Data,
    weights: Annotated[
        str,
        Option(
            "--from", metavar="RUN|PATH|timm/NAME|hub:NAME", help="A run, an encoder's folder, a file, ...: see --init."
        ),
    ],
    method: Annotated[str | None, Option(help="simclr by default; see inbatch methods. Your own: MODULE:NAME.")] = None,
    teacher: Annotated[
        str | None,
        Option(metavar="RUN|PATH|timm/NAME", help="Frozen encoder to learn from; the method is then relation."),
    ] = None,
    out: Annotated[
        Path | None, Option("--output-dir", "--out", "-o", help="Directory of the result; default runs/adapt-DATA-N.")
    ] = None,
    seeds: Annotated[
        int, Option(min=1, max=1000, help="Number of runs; one run cannot show that the training helped.")
    ] = 3,
    budget: Annotated[
        str | None, Option(metavar="TIME", help="Wall time of the command, with its verdict: 30m, 2h.")
    ] = None,
    epochs: Annotated[int | None, Option(help="Passes over the images; default 10 without a budget.")] = None,
    encoder: Annotated[
        str | None,
        Option(
            "--encoder",
            "--backbone",
            "--model",
            help="Encoder of weights that do not name it, or your own.",
        ),
    ] = None,
    lr: Annotated[float | None, Option("--lr", "--learning-rate", help="Rate of the heads; default 0.0003.")] = None,
    layer_decay: Annotated[
        float | None, Option(help="Ratio of the rates of successive layers, from the heads down; default 0.75.")
    ] = None,
    lora: Annotated[
        int | None,
        Option(min=1, metavar="RANK", help="Train only low-rank matrices (LoRA) in the encoder's linear layers."),
    ] = None,
    batch_size: Annotated[int | None, Option("--batch-size", "--batch", help="Samples per step.")] = None,
    image_size: Annotated[
        int | None, Option("--image-size", "--size", min=1, help="Side in pixels; default: that of the weights.")
    ] = None,
    test: Annotated[
        list[str] | None, Option(help="Labelled images for the verdict; default: the test split, or a tenth.")
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    set_: Set = None,
    device: Device = "auto",
    workers: Annotated[
        int | None, Option("--workers", "--num-workers", min=0, help="Processes that decode images.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Continue the training of existing weights on your images, and judge whether it has helped.

    The verdict compares the weights before and after by k-NN, linear probe and measures without labels, over seeds.
    DIR/encoder holds the weights to use: the new ones only if they are shown to be better.
    """
    with report_errors(as_json):
        from inbatch.apps.adaptation.adapt import adapt as run

        fields = {
            "epochs": epochs,
            "encoder": typed("encoder", encoder),
            "batch_size": batch_size,
            "image_size": image_size,
        }
        fields |= {"teacher": teacher, "image_column": image_column, "label_column": label_column}
        own = {"optimizer.lr": lr, "optimizer.layer_decay": layer_decay, "encoder.lora": lora}
        settings = {key: value for key, value in own.items() if value is not None} | assignments(set_)
        named: dict[str, Any] = {key: value for key, value in fields.items() if value is not None}
        code = [0]

        def compute() -> dict[str, Any]:
            result = run(
                joined_paths(data), weights, typed("method", method), out=out, seeds=seeds, budget=budget,
                settings=settings, test=joined_paths(test) or None, device=device, workers=workers, quiet=quiet,
                **named,
            )  # fmt: skip
            code[0] = result["exit_code"]
            return result | ({"error": result["sentence"]} if code[0] else {})

        emit_result(compute, as_json, _show_verdict)
        if code[0]:
            if as_json:
                print_error("adaptation did not help; the verdict is in the result")
            raise typer.Exit(code[0])


def _show_verdict(result: Mapping[str, Any]) -> None:
    """Print the figures before and after, and the verdict."""
    names = {"knn": "k-NN", "linear": "linear", **MEASURES}
    shares = {*result["accuracy"], "same_image"}
    rows = []
    for name, gain in (result["accuracy"] | result["unlabelled"]).items():
        factor, unit = (100, " %") if name in shares else (1, "")

        def cell(value: float | None, factor: float = factor, sign: str = "") -> str:
            return "" if value is None else f"{factor * value:{sign}.3g}"

        means = [sum(gain[when]) / result["seeds"] for when in ("before", "after")]
        interval = "" if gain["low"] is None else f"{cell(gain['low'], sign='+')} to {cell(gain['high'], sign='+')}"
        rows.append(
            (names.get(name, name.replace("_", " ")) + unit, *map(cell, means), cell(gain["gain"], sign="+"),
             cell(gain["spread"]), interval, gain["better"])
        )  # fmt: skip
    print_table(("", "before", "after", "change", "spread", "95 % interval", "better"), rows, numbers=True)
    say("", f"Verdict:    {result['sentence']}")
    images = f"{many(result['test_images'], 'image')}: {result['held_out']}" if result["held_out"] else "no labels"
    say(f"Judged by:  {images}; spread over {many(result['seeds'], 'seed')}")
