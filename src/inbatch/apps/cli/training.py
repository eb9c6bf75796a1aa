"""Commands for training: quickstart, pretrain."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from inbatch.apps.cli.app import (
    KINDS,
    SEEDS,
    Device,
    DistTimeout,
    GroupColumn,
    ImageColumn,
    Json,
    LabelColumn,
    Quiet,
    Set,
    app,
    emit_result,
    report_errors,
)
from inbatch.apps.cli.output import (
    print_dry_run,
    print_run,
    print_verdict,
)
from inbatch.apps.cli.own_code import typed
from inbatch.apps.cli.pretrain_options import pretrain_settings
from inbatch.apps.console import print_error, print_json
from inbatch.errors import ConfigError, TrainingError
from inbatch.runtime import own_parts
from inbatch.runtime.path_list import joined_paths
from inbatch.runtime.paths import path_of
from inbatch.training.budget import parse_budget


@app.command(
    epilog="Examples:\n\n  inbatch quickstart\n\n"
    "  inbatch quickstart --epochs 8 --margin 5     less time, for CI\n\n"
    "  inbatch quickstart --json > figures.json",
)
def quickstart(
    out: Annotated[
        Path, Option("--output-dir", "--out", "-o", help="Run directory; a number is added if it exists.")
    ] = Path("runs/quickstart"),
    epochs: Annotated[int | None, Option(min=1, help="Number of epochs; default 10.")] = None,
    margin: Annotated[float, Option(help="Exit with code 4 below this gain over raw pixels, in points of k-NN.")] = 20,
    seed: Annotated[int, Option(min=0, max=SEEDS, help="Seed of weights, order and views.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pretrain on embedded handwritten digits and evaluate the gain. Takes about a minute on two cores."""
    with report_errors(as_json):
        from inbatch.apps.quickstart import quickstart as run

        verdict = run(out, epochs=epochs, margin=margin, seed=seed, device=device, quiet=quiet)
        if as_json:
            failure = {} if verdict.reached else {"error": verdict.sentence(), "exit_code": TrainingError.exit_code}
            print_json(verdict.json() | failure)
        else:
            print_verdict(verdict)
        if not verdict.reached:
            print_error(verdict.sentence())
            raise typer.Exit(TrainingError.exit_code)


@app.command(
    epilog="Examples:\n\n  inbatch pretrain --data ~/photos\n\n  inbatch pretrain --data ~/photos --budget 45m\n\n"
    "  inbatch pretrain moco --data ~/photos --encoder resnet50 --set method.queue_size=16384\n\n"
    "  inbatch pretrain --data ~/photos --encoder resnet10 --teacher runs/simclr-photos-1\n\n"
    "  inbatch pretrain --data ~/photos --dry-run\n\n"
    "  torchrun --nproc-per-node 4 -m inbatch pretrain --data ~/photos --batch-size 4096",
)
def pretrain(
    method: Annotated[
        str | None, Argument(metavar="METHOD", help="simclr, moco, ... (inbatch methods), or MODULE:NAME.")
    ] = None,
    data: Annotated[list[str] | None, Option(help=f"{KINDS[:-1]}, each with --data, or a pattern in quotes.")] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    group_column: GroupColumn = None,
    out: Annotated[
        Path | None, Option("--output-dir", "--out", "-o", help="Run directory; default runs/METHOD-DATA-NUMBER.")
    ] = None,
    preset: Annotated[str | None, Option(help="Preset of the method; default: chosen by image size.")] = None,
    own_method: Annotated[str | None, Option("--method", hidden=True)] = None,  # as METHOD
    encoder: Annotated[
        str | None,
        Option(
            "--encoder",
            "--backbone",
            "--model",
            help="fast, tiny, resnet10, any timm model, torchvision/NAME, or MODULE:NAME.",
        ),
    ] = None,
    views: Annotated[str | None, Option(help="simclr, mocov2, ..., or MODULE:NAME.")] = None,
    init: Annotated[
        str | None, Option(metavar="RUN|FILE|timm|hub:NAME", help="Initial weights, also of other programs.")
    ] = None,
    init_min_match: Annotated[float | None, Option(min=0, max=1, hidden=True)] = None,  # named where --init fails
    teacher: Annotated[
        str | None,
        Option(metavar="RUN|PATH|timm/NAME", help="Frozen encoder to learn from; the method is then relation."),
    ] = None,
    image_size: Annotated[
        int | None, Option("--image-size", "--size", min=1, help="Side of the encoder's images, in pixels.")
    ] = None,
    batch_size: Annotated[
        int | None, Option("--batch-size", "--batch", help="Samples per step, over all processes.")
    ] = None,
    context: Annotated[
        str | None,
        Option(
            metavar="N|auto",
            help="Samples that share batch statistics; it sets the memory use. auto: the largest that fits.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        Option(metavar="TIME", help="Wall time of the whole run: 45m, 1h30m, 2d. Default on a CPU: 1h."),
    ] = None,
    epochs: Annotated[int | None, Option(help="Passes over the images.")] = None,
    optimizer: Annotated[str | None, Option(help="lars, sgd, adamw, ..., or MODULE:NAME.")] = None,
    lr: Annotated[float | None, Option("--lr", "--learning-rate", help="Learning rate.")] = None,
    precision: Annotated[
        str | None,
        Option("--precision", "--amp", metavar="auto|bf16|float32", help="Precision of the networks; --amp: bf16."),
    ] = None,
    seed: Annotated[int | None, Option(help="Seed of weights, order and views.")] = None,
    fuse: Annotated[
        str | None, Option(metavar="conv|set", help="Batch fusion: mix the images of a context group.")
    ] = None,
    attend: Annotated[
        str | None, Option(help="Attention over samples: ba2m, batchformer; per sample: se, eca, cbam.")
    ] = None,
    mix: Annotated[
        str | None, Option(metavar="imix|mixco|unmix|cutmix", help="Mix images of a context group, and their targets.")
    ] = None,
    curate: Annotated[
        bool, Option("--curate", help="Batch curation: redraw views that do not match their sample.")
    ] = False,
    negatives: Annotated[
        str | None,
        Option(metavar="drop-similar|debias|hard", help="Negatives: leave out near duplicates, or weight them."),
    ] = None,
    sampler: Annotated[
        str | None,
        Option(
            metavar="balanced|apart|neighbours",
            help="Batches of equal classes, without two images of a group, or of neighbours.",
        ),
    ] = None,
    crops: Annotated[str | None, Option(help="Geometry of the two views' crops; see inbatch crops.")] = None,
    shuffle_groups: Annotated[
        bool, Option("--shuffle-groups", help="Use other context groups for the target network.")
    ] = False,
    device: Device = "auto",
    compile: Annotated[
        bool, Option("--compile", help="Compile the networks: a slower start, then faster steps.")
    ] = False,
    shard: Annotated[
        bool, Option("--shard", help="Divide the encoder over the processes (FSDP2): models larger than a card.")
    ] = False,
    checkpoint_activations: Annotated[
        bool, Option("--checkpoint-activations", help="Compute blocks again in the backward pass: less memory.")
    ] = False,
    workers: Annotated[
        int | None, Option("--workers", "--num-workers", min=0, help="Processes that decode images.")
    ] = None,
    read: Annotated[
        str | None,
        Option(
            metavar="auto|random|sequential",
            help="Read images by index, or shards one after another; auto: the latter for URLs.",
        ),
    ] = None,
    download: Annotated[bool, Option("--download", help="Download a torchvision/NAME that is missing.")] = False,
    config: Annotated[Path | None, Option(metavar="FILE", help="A YAML or JSON file of settings.")] = None,
    set_: Set = None,
    resume: Annotated[
        str | None,
        Option(metavar="RUN|auto", help="Continue a run, also with moved --data; auto, or no value: in --output-dir."),
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the run in --output-dir.")] = False,
    expect_world_size: Annotated[
        int | None, Option(metavar="N", help="Fail if the number of processes differs.")
    ] = None,
    stop_on_collapse: Annotated[
        bool, Option("--stop-on-collapse", help="Exit with code 4 if features collapse.")
    ] = False,
    dist_timeout: DistTimeout = 1800,
    compare: Annotated[
        str | None,
        Option(metavar="RUN|auto", help="Compare the curve with a run's; auto: with shipped reference runs."),
    ] = None,
    track: Annotated[
        list[str] | None,
        Option(
            metavar="NAME,...", help="Also record the run with wandb, mlflow, trackio; none: no TensorBoard either."
        ),
    ] = None,
    callback: Annotated[
        list[str] | None, Option("--callback", metavar="MODULE:NAME", help="An inbatch.Callback of yours; repeatable.")
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print recipe, shapes, memory and time; do not train.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Pretrain an encoder on images and write a run directory: recipe, log, curves, checkpoints, encoder, result."""
    options = dict(locals())
    with report_errors(as_json):
        if data and method is not None and os.path.exists(method):
            raise ConfigError(
                f"{method!r} is a path, not a method: write a pattern in quotes, and --data before each path"
            )
        if method is not None and own_method is not None:
            raise ConfigError(f"two methods, {method} and --method {own_method}: leave out one of them")
        where = joined_paths(data) or None
        if budget is not None:
            parse_budget(budget)  # before the import of torch, which takes seconds
        from inbatch import api

        kind = typed("method", own_method or method)
        own = {part: typed(part, options[part]) for part in ("encoder", "views", "optimizer")}
        fields, settings = pretrain_settings(options | own)
        shared: dict[str, Any] = {"config": config, "settings": settings, "device": device, "workers": workers}
        shared["download"] = download
        callbacks = [own_parts.imported("callback", text) for text in callback or ()]
        if dry_run:
            if resume is not None:
                raise ConfigError(
                    "--dry-run shows a new run: leave out --resume (a run's recipe.json holds its settings)"
                )
            if compare is not None:
                raise ConfigError("--dry-run makes no curve that could be compared: leave out --compare")
            from inbatch.training.claim import check_place
            from inbatch.training.trackers.selection import requested_trackers

            requested_trackers(track)
            if out is not None:
                check_place(path_of(out, "--output-dir"))
            dry = api.dry_run(where, kind, expect_world_size=expect_world_size, **shared, **fields)
            print_json(dry) if as_json else print_dry_run(dry)
            return
        shared |= {"track": track, "callbacks": callbacks}
        shared |= {"expect_world_size": expect_world_size, "dist_timeout": dist_timeout, "compare": compare}
        shared |= {"resume": False if resume is None else resume, "overwrite": overwrite, "quiet": quiet}

        def train() -> dict[str, Any]:
            folder = api.restarted(None) if out is None and resume is None else out
            run = api.pretrain(where, kind, out=folder, stop_on_collapse=stop_on_collapse, **shared, **fields)
            return {"run": str(run.directory)} | run.result

        emit_result(train, as_json, print_run)
