"""The command line. Torch and everything that needs it is imported when a command runs: help is instant."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from inbatch.errors import ConfigError, DataError, InbatchError, Interrupted, TrainingError
from inbatch.show import (
    complain,
    explain,
    explain_plugins,
    first,
    print_figures,
    print_json,
    print_method,
    print_methods,
    print_plugin,
    print_plugins,
    print_rehearsal,
    print_run,
    print_table,
    print_verdict,
    say,
)

app = typer.Typer(
    name="inbatch",
    help="Learn image features by letting the samples of a batch teach each other.",
    epilog="Start here:\n\n  inbatch quickstart\n\n  inbatch pretrain --data ~/photos\n\n"
    "  inbatch pretrain --help\n\n"
    "Exit codes: 0 fine, 1 crash, 2 usage or settings, 3 data, 4 diverged or promise not kept, "
    "75 stopped with a checkpoint, 130 Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The program `inbatch`."""
    app()


Json = Annotated[bool, Option("--json", help="One JSON object on stdout, everything else on stderr.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="Only results and errors.")]
Device = Annotated[str, Option(help="auto, cpu or cuda.")]
Set = Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help="Any setting, as often as you like.")]
RunFolder = Annotated[Path, Argument(metavar="RUN", help="The folder of a finished run.")]
Data = Annotated[str, Argument(metavar="DATA", help="A folder, a Parquet file or folder, or digits-canvas.")]


def print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        say(version("inbatch"))
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before a command."""


@app.command(
    epilog="Examples:\n\n  inbatch quickstart\n\n"
    "  inbatch quickstart --epochs 8 --margin 5     a few seconds, for CI\n\n"
    "  inbatch quickstart --json > figures.json"
)
def quickstart(
    out: Annotated[Path, Option(help="The run's folder; gets a number where it exists.")] = Path("runs/quickstart"),
    epochs: Annotated[int | None, Option(min=1, help="Fewer for a smaller budget.")] = None,
    margin: Annotated[float, Option(help="Points of k-NN above raw pixels without which it exits with 4.")] = 20,
    seed: Annotated[int, Option(min=0, help="Of weights, order and views.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn from real handwritten digits that come along, and see what it is worth. About a minute on two cores."""
    with reported(as_json):
        from inbatch.quickstart import quickstart as run

        verdict = run(out, epochs=epochs, margin=margin, seed=seed, device=device, quiet=quiet)
        if as_json:
            failure = {} if verdict.reached else {"error": verdict.sentence(), "exit_code": TrainingError.exit_code}
            print_json(verdict.json() | failure)
        else:
            print_verdict(verdict)
        if not verdict.reached:
            complain(verdict.sentence())
            raise typer.Exit(TrainingError.exit_code)


@app.command(
    epilog="Examples:\n\n  inbatch pretrain --data ~/photos\n\n"
    "  inbatch pretrain moco --data ~/photos --encoder resnet50 --set method.queue=16384\n\n"
    "  inbatch pretrain --data ~/photos --dry-run\n\n"
    "  torchrun --nproc-per-node 4 -m inbatch pretrain --data ~/photos --batch 4096"
)
def pretrain(
    method: Annotated[str | None, Argument(metavar="METHOD", help="simclr, moco, ...: see inbatch methods.")] = None,
    data: Annotated[str | None, Option(help="A folder, a Parquet file or folder, or digits-canvas.")] = None,
    out: Annotated[Path | None, Option(help="The run's folder; runs/METHOD-DATA-NUMBER by default.")] = None,
    preset: Annotated[str | None, Option(help="Settings of a paper; by default those for the images' size.")] = None,
    encoder: Annotated[str | None, Option(help="tiny, resnet10, any timm model, torchvision/NAME.")] = None,
    init: Annotated[str | None, Option(metavar="PATH|timm", help="Weights to start from.")] = None,
    batch: Annotated[int | None, Option(help="Samples per step, over all processes.")] = None,
    context: Annotated[
        str | None, Option(metavar="N|auto", help="Samples that share batch norm; memory follows it. auto: what fits.")
    ] = None,
    epochs: Annotated[int | None, Option(help="Passes over the images.")] = None,
    seed: Annotated[int | None, Option(help="Of weights, order and views.")] = None,
    fuse: Annotated[str | None, Option(metavar="conv|set", help="Mix a group's images before the encoder.")] = None,
    attend: Annotated[str | None, Option(help="ba2m, batchformer: attention over the samples; se, eca, cbam.")] = None,
    curate: Annotated[bool, Option("--curate", help="Redraw views that their sample cannot be told by.")] = False,
    crops: Annotated[str | None, Option(help="How two views' crops lie to each other: see inbatch crops.")] = None,
    shuffle_groups: Annotated[bool, Option("--shuffle-groups", help="Other groups for what views learn from.")] = False,
    device: Device = "auto",
    compile: Annotated[bool, Option("--compile", help="Compile the encoder: slower to start, then faster.")] = False,
    workers: Annotated[int | None, Option(min=0, help="Processes that decode images that do not fit.")] = None,
    config: Annotated[Path | None, Option(metavar="FILE", help="A YAML or JSON file of settings.")] = None,
    set_: Set = None,
    resume: Annotated[str | None, Option(metavar="RUN|auto", help="Go on in a run; auto: in --out, if it can.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the run in --out.")] = False,
    expect_world_size: Annotated[int | None, Option(metavar="N", help="Refuse another number of processes.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print recipe, shapes and memory; write nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn features from images and leave a run's folder: recipe, log, curves, checkpoints, encoder, result."""
    with reported(as_json):
        from inbatch import api

        chosen = {"preset": preset, "encoder": encoder, "batch": batch, "context": context, "epochs": epochs}
        chosen |= {"seed": seed, "compile": compile or None, "fuse": fuse, "attend": attend, "crops": crops}
        chosen |= {"curate": "redraw" if curate else None, "shuffle_groups": shuffle_groups or None}
        fields: dict[str, Any] = {key: value for key, value in chosen.items() if value is not None}
        settings = ({} if init is None else {"encoder.init": init}) | assignments(set_)
        shared: dict[str, Any] = {"config": config, "settings": settings, "device": device, "workers": workers}
        if dry_run:
            if resume is not None:
                raise ConfigError(
                    "--dry-run shows a new run: leave out --resume (a run's recipe.json holds its settings)"
                )
            rehearsed = api.rehearse(data, method, expect_world_size=expect_world_size, **shared, **fields)
            print_json(rehearsed) if as_json else print_rehearsal(rehearsed)
            return
        run = api.pretrain(
            data, method, out=out, resume=False if resume is None else resume, overwrite=overwrite, quiet=quiet,
            expect_world_size=expect_world_size, **shared, **fields,
        )  # fmt: skip
        print_json({"run": str(run.directory)} | run.result) if as_json else print_run(run)


@app.command(
    epilog="Examples:\n\n  inbatch evaluate runs/simclr-photos-1\n\n"
    "  inbatch evaluate runs/simclr-photos-1 --protocol knn --k 20\n\n"
    "  inbatch evaluate runs/cc-photos-1 --protocol clustering --from head\n\n"
    "  inbatch evaluate runs/simclr-photos-1 --data ~/flowers --test ~/flowers-test --probe moco"
)
def evaluate(
    run: RunFolder,
    data: Annotated[str | None, Option(help="Labelled images to judge by; the run's own by default.")] = None,
    test: Annotated[str | None, Option(help="Test images; else the data's test split or a tenth of it.")] = None,
    protocol: Annotated[list[str] | None, Option(help="knn, linear, clustering; all by default.")] = None,
    from_: Annotated[
        str, Option("--from", metavar="features|head", help="Clusters: k-means on features; head: the method's, too.")
    ] = "features",
    k: Annotated[int | None, Option(min=1, help="Neighbours; the recipe's by default.")] = None,
    temperature: Annotated[float, Option(min=0.001, help="Of the neighbours' weights.")] = 0.1,
    probe: Annotated[
        str, Option(help="How the linear probe is trained: lbfgs, or as a paper did: moco, ...")
    ] = "lbfgs",
    seed: Annotated[int | None, Option(min=0, help="Of k-means and probe; the recipe's by default.")] = None,
    out: Annotated[Path | None, Option(help="The file to write; RUN/evaluation.json by default.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Judge a run's encoder by k-NN, a linear probe and clustering; the protocol stands beside every figure."""
    with reported(as_json):
        from inbatch.api import evaluate_run
        from inbatch.files import write_json

        protocols = protocol or ["knn", "linear", "clustering"]
        options: dict[str, Any] = {"temperature": temperature, "probe": probe, "device": device, "from_": from_}
        options |= {key: value for key, value in {"k": k, "seed": seed}.items() if value is not None}
        found = evaluate_run(run, data, test, protocols=protocols, **options)
        out = out or run / "evaluation.json"
        write_json(out, found)
        if as_json:
            print_json(found)
        else:
            print_figures({str(run): found})
            say("", f"Judged by:  {found['held_out']}", f"Written to: {out}")


@app.command(
    epilog="Examples:\n\n  inbatch embed runs/simclr-photos-1 ~/photos -o features.parquet\n\n"
    "  inbatch embed runs/simclr-photos-1 ~/photos -o features.npz --split test"
)
def embed(
    run: RunFolder,
    data: Data,
    out: Annotated[Path, Option("--out", "-o", help="A .parquet or .npz file; replaced where it exists.")],
    split: Annotated[str | None, Option(help="train or test, where the data has both.")] = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write path, index, label and feature vector of every image to a file; memory does not grow with their number."""
    with reported(as_json):
        from inbatch.api import embed_run

        count = embed_run(run, data, out, split=split, device=device, quiet=quiet)
        print_json({"images": count, "out": str(out)}) if as_json else say(f"{count:,} images embedded into {out}")


@app.command(
    epilog="Examples:\n\n  inbatch views ~/photos -o views.png\n\n"
    "  inbatch views ~/photos --views swav --size 224\n\n"
    "  inbatch views ~/photos --views simclr --crops adjacent\n\n"
    "  inbatch views digits-canvas --count 16 --set views.strength=0.5"
)
def views(
    data: Data,
    out: Annotated[Path, Option("--out", "-o", help="The picture; replaced where it exists.")] = Path("views.png"),
    views: Annotated[
        str | None, Option(help="simclr, mocov2, swav, ...; those for the images' size by default.")
    ] = None,
    preset: Annotated[str | None, Option(help="The views of this preset of the method.")] = None,
    crops: Annotated[str | None, Option(help="How two views' crops lie to each other: see inbatch crops.")] = None,
    method: Annotated[str | None, Option(help="Whose presets; simclr by default.")] = None,
    size: Annotated[int | None, Option(min=1, help="Side of the views in pixels.")] = None,
    count: Annotated[int, Option(min=1, help="Images.")] = 8,
    seed: Annotated[int, Option(min=0, help="Which images, and what is drawn.")] = 0,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Draw images beside the views a method would learn from: judge by eye before training."""
    with reported(as_json):
        from inbatch.api import draw_views

        fields = {"views": views, "preset": preset, "crops": crops, "size": size}
        chosen = {key: value for key, value in fields.items() if value is not None}
        part = draw_views(data, out, method, count=count, seed=seed, settings=assignments(set_), **chosen)
        if as_json:
            print_json({"out": str(out), "views": part.name, "options": part.options})
        else:
            options = ", ".join(f"{key} {value}" for key, value in part.options.items())
            say(f"{out}: every image with its crops, then its views ({part.name}: {options})")


@app.command(
    epilog="Examples:\n\n  inbatch inspect runs/simclr-photos-1\n\n"
    "  inbatch inspect runs/simclr-photos-1 -o pictures --count 16 --seed 1"
)
def inspect(
    run: Annotated[Path, Argument(metavar="RUN", help="The folder of a run, finished or stopped.")],
    data: Annotated[str | None, Option(help="Where its images are now; as in its recipe by default.")] = None,
    out: Annotated[Path | None, Option("--out", "-o", help="The pictures' folder; RUN/inspect by default.")] = None,
    count: Annotated[int, Option(min=1, help="Images to a picture.")] = 8,
    seed: Annotated[int, Option(min=0, help="Which images, and what is drawn.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw what a run's plug-ins do to a batch (fusion, curation, attention), and measure it; learns nothing."""
    with reported(as_json):
        from inbatch.api import inspect_run
        from inbatch.inspect.context import rows

        found = inspect_run(run, data, out=out, count=count, seed=seed, device=device)
        if as_json:
            print_json(found)
            return
        print_table(("plug-in", "measured", "found"), rows(found))
        say("", f"Run:       {run}, step {found['step']:,}, a batch of epoch {found['epoch'] + 1}")
        if found["note"]:
            say(f"Note:      {found['note']}")
        for picture in found["pictures"]:
            say(f"Picture:   {picture}")


@app.command(
    epilog="Examples:\n\n  inbatch crops -o crops.png\n\n"
    "  inbatch crops --crops all --size 224 --pairs 100000\n\n"
    "  inbatch crops --sampler torchvision --size 375x500 --pairs 20000"
)
def crops(
    name: Annotated[str, Option("--crops", help="default, global-local, adjacent, ..., or all.")] = "default",
    size: Annotated[str, Option(help="Of the images, in pixels: a side, or HEIGHTxWIDTH.")] = "32",
    pairs: Annotated[int, Option(help="How many pairs of crops to draw.")] = 1_000_000,
    out: Annotated[Path | None, Option("--out", "-o", help="A picture, too: coverage and shares.")] = None,
    sampler: Annotated[str, Option(metavar="ours|torchvision", help="Who draws; torchvision is slow.")] = "ours",
    seed: Annotated[int, Option(min=0, help="Of what is drawn.")] = 0,
    as_json: Json = False,
) -> None:
    """Count how two crops of an image lie to each other: one inside the other, apart, or across its edges."""
    with reported(as_json):
        from inbatch.inspect import crops as inspect

        names, sides = inspect.chosen(name, sampler), inspect.parse_size(size)
        tallies = [inspect.tally(one, sides, pairs, seed, sampler, partial(typer.echo, err=True)) for one in names]
        if out is not None:
            inspect.plot(tallies, sides, pairs, out)
        if as_json:
            told = {"size": sides, "pairs": pairs, "sampler": sampler, "seed": seed, "out": out and str(out)}
            print_json(told | {"crops": {t.name: t.json() for t in tallies}})
        else:
            print_table(inspect.HEADINGS, inspect.rows(tallies, sides), numbers=True)
            say("", f"{pairs:,} pairs of {sides[0]} x {sides[1]} pixels, drawn by {sampler}")
            if out is not None:
                say(f"Picture: {out}")


@app.command(epilog="Examples:\n\n  inbatch methods\n\n  inbatch methods moco")
def methods(
    name: Annotated[str | None, Argument(metavar="NAME", help="One method: its options, presets, sources.")] = None,
    as_json: Json = False,
) -> None:
    """What there is to learn with; with a NAME its options and its presets."""
    with reported(as_json):
        from inbatch.config import METHODS, method_named

        if name is not None:
            told = explain(name, method_named(name))
            print_json(told) if as_json else print_method(told)
            return
        every = [explain(name, kind) for name, kind in METHODS.items()]
        print_json({"methods": every}) if as_json else print_methods(every)


@app.command(epilog="Examples:\n\n  inbatch plugins\n\n  inbatch plugins conv")
def plugins(
    name: Annotated[str | None, Argument(metavar="NAME", help="One plug-in: its options.")] = None,
    as_json: Json = False,
) -> None:
    """How samples can meet before the loss (fusion, curation, attention), with any method; with a NAME its options."""
    with reported(as_json):
        every = explain_plugins()
        if name is None:
            print_json({"plugins": every}) if as_json else print_plugins(every)
            return
        known = {plugin["name"]: plugin for plugin in every}
        if name not in known:
            raise ConfigError(f"there is no plug-in {name!r}; there are {', '.join(known)}")
        print_json(known[name]) if as_json else print_plugin(known[name])


@contextmanager
def reported(as_json: bool) -> Iterator[None]:
    """Errors for people: a sentence on stderr, with --json an object on stdout too, and the exit code of their kind."""
    message, code = "interrupted", Interrupted.exit_code
    try:
        yield
        return
    except KeyboardInterrupt:
        several = False
    except InbatchError as error:
        message, code = str(error), error.exit_code
        # What ranks decide together is told once; what may befall one of them, by the one it befell.
        several = type(error) in (InbatchError, DataError)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
            raise
        message, code = f"the GPU is full: a smaller --context (or auto) needs less, whatever the batch ({error})", 1
        several = True
    if first() or several:
        complain(message)
    if as_json:
        print_json({"error": message, "exit_code": code})
    raise typer.Exit(code)


def assignments(texts: list[str] | None) -> dict[str, Any]:
    """The values of --set as settings."""
    from inbatch.config import parse_assignment

    return {key: value for text in texts or () for key, value in parse_assignment(text).items()}
