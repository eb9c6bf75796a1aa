"""Commands that use a trained encoder: evaluate, embed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from inbatch.apps.cli.app import (
    SEEDS,
    Data,
    Device,
    DistTimeout,
    ImageColumn,
    Json,
    LabelColumn,
    Quiet,
    RunFolder,
    app,
    default_output,
    emit_result,
    report_errors,
    requested_output,
)
from inbatch.apps.cli.output import print_evaluation
from inbatch.apps.cli.own_code import OwnEncoder, OwnMethod, OwnViews
from inbatch.apps.console import first, print_json, say, warn
from inbatch.errors import ConfigError, many, unreadable
from inbatch.runtime.path_list import joined_paths
from inbatch.runtime.paths import path_of


@app.command(
    epilog="Examples:\n\n  inbatch evaluate runs/simclr-photos-1\n\n"
    "  inbatch evaluate runs/simclr-photos-1 --protocol knn --k 20\n\n"
    "  inbatch evaluate runs/simclr-photos-1 --protocol few,corruptions\n\n"
    "  inbatch evaluate runs/simclr-photos-1 --protocol finetune --tuning-share 0.1\n\n"
    "  inbatch evaluate runs/cc-photos-1 --protocol clustering --from head\n\n"
    "  inbatch evaluate runs/simclr-photos-1 --data ~/flowers --test ~/flowers-test --probe moco",
)
def evaluate(
    run: RunFolder,
    data: Annotated[
        list[str] | None, Option(help="Labelled images to evaluate on, of any classes and sizes; default: the run's.")
    ] = None,
    test: Annotated[
        list[str] | None, Option(help="Test images; default: the test split of the data, or a tenth of it.")
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    protocol: Annotated[
        list[str] | None,
        Option(
            "--protocol",
            "--protocols",
            help="knn, linear, clustering (by default these three), retrieval, few, finetune, corruptions.",
        ),
    ] = None,
    from_: Annotated[
        str,
        Option(
            "--from",
            metavar="features|head",
            help="Clusters of k-means on features; head: also those of the method's head.",
        ),
    ] = "features",
    k: Annotated[int | None, Option(min=1, help="Number of neighbours; default: the recipe's.")] = None,
    temperature: Annotated[
        float | None, Option(min=0.001, help="Temperature of the neighbours' weights; default 0.1.")
    ] = None,
    probe: Annotated[
        str | None, Option(help="Training of the linear probe: lbfgs (default), or a paper's: moco, ...")
    ] = None,
    share: Annotated[
        list[float] | None,
        Option("--label-fraction", "--share", help="Fraction of the labels, for few; default 0.01, 0.1, 0.5."),
    ] = None,
    draws: Annotated[
        int | None, Option("--label-seeds", "--draws", min=1, help="Random draws of these labels; default 3.")
    ] = None,
    tuning: Annotated[str | None, Option(help="Fine-tuning recipe: small, upright, simclr-1, simclr-10.")] = None,
    tuning_share: Annotated[float | None, Option(help="Fraction of the labels, for finetune; default: all.")] = None,
    most: Annotated[
        int | None, Option("--max-test-images", "--most", min=1, help="Test images to corrupt; default 1000.")
    ] = None,
    seed: Annotated[int | None, Option(min=0, max=SEEDS, help="Random seed; default: the recipe's.")] = None,
    out: Annotated[Path | None, Option("--out", "-o", help="Output file; default RUN/evaluation.json.")] = None,
    encoder: OwnEncoder = None,
    method: OwnMethod = None,
    views: OwnViews = None,
    dist_timeout: DistTimeout = 1800,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Evaluate a run's encoder by k-NN, linear probe, clustering and more, and state every figure's protocol.

    Under torchrun all ranks share the work.
    """
    with report_errors(as_json):
        from inbatch.api import evaluate_run
        from inbatch.evaluation.evaluate import PROTOCOLS
        from inbatch.runtime.files import write_json

        protocols = None if protocol is None else [name for names in protocol for name in names.split(",")]
        options: dict[str, Any] = {"device": device, "from_": from_}
        options["dist_timeout"] = dist_timeout
        chosen: dict[str, Any] = {"k": k, "seed": seed, "shares": share, "draws": draws, "tuning": tuning, "most": most}
        chosen |= {"temperature": temperature, "probe": probe}
        chosen |= {"tuning_share": tuning_share, "image_column": image_column, "label_column": label_column}
        options |= {key: value for key, value in chosen.items() if value is not None}
        check_used(options, protocols or PROTOCOLS[:3])
        where, other = joined_paths(data) or None, joined_paths(test) or None
        file = requested_output(out) if out else default_output(path_of(run, "RUN") / "evaluation.json")

        def show(result: dict[str, Any]) -> None:
            print_evaluation(result, str(run))

        def write(result: dict[str, Any]) -> None:
            if not first():
                return
            write_json(file, result)
            if not as_json:
                say(f"Written to: {file}")

        emit_result(lambda: evaluate_run(run, where, other, protocols=protocols, **options), as_json, show, write)


OPTIONS_OF = {
    "k": ("--k", "knn", "few", "corruptions"),
    "temperature": ("--temperature", "knn", "few", "corruptions"),
    "probe": ("--probe", "linear", "few", "corruptions"),
    "shares": ("--label-fraction", "few"),
    "draws": ("--label-seeds", "few"),
    "tuning": ("--tuning", "finetune"),
    "tuning_share": ("--tuning-share", "finetune"),
    "most": ("--max-test-images", "corruptions"),
}
"""Argument of `evaluate_run` -> its option, and the protocols that use it."""


def check_used(options: Mapping[str, Any], protocols: Sequence[str]) -> None:
    """Raise ConfigError for an option of protocols that are not requested."""
    for name, (option, *users) in OPTIONS_OF.items():
        if name in options and not {*users} & {*protocols}:
            wanted = " or ".join(f"--protocol {user}" for user in users)
            raise ConfigError(f"{option} has no effect on {', '.join(protocols)}: add {wanted}, or leave it out")


@app.command(
    epilog="Examples:\n\n  inbatch embed runs/simclr-photos-1 ~/photos -o features.parquet\n\n"
    "  inbatch embed runs/simclr-photos-1 ~/photos -o features.npz --split test\n\n"
    "  inbatch embed runs/simclr-photos-1 ~/photos -o tokens.npz --tokens --float16",
)
def embed(
    run: RunFolder,
    data: Data,
    out: Annotated[Path, Option("--out", "-o", help="Output file, .parquet or .npz; replaced if it exists.")],
    split: Annotated[str | None, Option(help="Only this split: train, val, test, ...; default: all.")] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    plain: Annotated[
        bool, Option("--plain", help="Features before whitening (preset fast): for clustering with other tools.")
    ] = False,
    tokens: Annotated[
        bool, Option("--tokens", help="Patch tokens, or the last feature map, instead of one vector per image.")
    ] = False,
    float16: Annotated[bool, Option("--float16", help="Write --tokens in half precision.")] = False,
    encoder: OwnEncoder = None,
    dist_timeout: DistTimeout = 1800,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write split, path, index, label and features of every image to a file; memory does not grow with their number.

    Under torchrun all ranks share the images. After an interruption the same command continues with what is finished.
    """
    with report_errors(as_json):
        from inbatch.api import embed_run

        missing, stage = dict[int, str](), dict[str, Any]()
        options: dict[str, Any] = {"split": split, "device": device, "quiet": quiet, "plain": plain}
        options |= {"image_column": image_column, "label_column": label_column, "tokens": tokens, "float16": float16}
        options["dist_timeout"] = dist_timeout
        count = embed_run(run, joined_paths(data), out, missing=missing, stage=stage, **options)
        if as_json:
            bad = {"unreadable": list(missing.values())} if missing else {}
            splits = {"splits": stage.pop("splits")}
            print_json({"images": count, "out": str(out)} | splits | bad | (stage if stage["note"] else {}))
            return
        note = [f"Note: {stage['note']}"] if stage["note"] else []
        parts = ", ".join(f"{n:,} of {name}" for name, n in stage["splits"].items())
        of = f" ({parts})" if len(stage["splits"]) > 1 else ""
        say(f"{many(count, 'image')} embedded into {out}{of}", *note)
        if missing:
            few = "; ".join(list(missing.values())[:3])
            warn(f"{unreadable(len(missing))} not in it: {few}")
