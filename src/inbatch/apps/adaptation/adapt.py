"""Continue the training of existing weights on other images, and judge whether it has helped."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from inbatch.api import Run, load, load_run, pretrain
from inbatch.apps.adaptation.gain import Gain, accuracy_gain, measure_gain
from inbatch.apps.adaptation.hits import measure_hits
from inbatch.apps.adaptation.share import check_budget, planned_share
from inbatch.apps.adaptation.start import starting_settings, training_settings
from inbatch.apps.adaptation.verdict import HELPED, NO_HELP, Verdict
from inbatch.data import Source
from inbatch.errors import ConfigError, InbatchError, Interrupted, Preempted, TrainingError, Unwritten, check_whole
from inbatch.models import Encoder, load_encoder, save_encoder
from inbatch.runtime import distributed, tuning
from inbatch.runtime.device import device_for
from inbatch.runtime.files import object_in, read_json, to_json, write_json
from inbatch.runtime.isolation import isolated
from inbatch.runtime.path_list import joined_paths
from inbatch.runtime.paths import path_of
from inbatch.runtime.process_group import process_group
from inbatch.runtime.terminal import progress
from inbatch.training.budget import duration, parse_budget
from inbatch.training.claim import claim, numbered
from inbatch.training.holdout import EvaluationSplit, evaluation_split
from inbatch.training.monitors.online_evaluation import fit_readout, limited
from inbatch.training.own_requests import with_own_parts
from inbatch.training.plan import plan_without_budget
from inbatch.training.requested_settings import check_one_length, merged_settings, requested_test

REQUEST, VERDICT = "adapt.json", "verdict.json"
SHARE = "seconds_of_a_run"
"""Entry of the request with a budget: the share of each run, which a repeated call keeps."""


@isolated
@with_own_parts
def adapt(
    data: Any, weights: Any, method: Any = None, *, out: str | Path | None = None, seeds: int = 3,
    budget: Any = None, settings: Mapping[str, Any] | None = None, test: Any = None, device: str = "auto",
    workers: int | None = None, quiet: bool = False, **fields: Any,
) -> dict[str, Any]:  # fmt: skip
    """Continue the training of existing weights on other images with several seeds, and judge whether it has helped.

    The encoder learns with a low rate that decreases from layer to layer, after an epoch in which only the heads learn
    (`adaptation.start`). Every setting of a recipe can be set. A repeated call with its `out` continues an adaptation:
    seeds that are finished are not trained again, and `seeds` may be larger.

    Args:
        data: Images, as for `pretrain`.
        weights: Weights to start from: a run, an encoder's folder, a file of weights, hub:OWNER/NAME, or timm/NAME.
        method: A name of `METHODS`, or your own (`pretrain`); simclr by default.
        out: Directory of the result, runs/adapt-DATA-NUMBER by default.
        seeds: Number of runs, with the seeds 0, 1, ...; one seed has no spread, and its verdict is never "helped".
        budget: Wall time of the whole call ("30m"), to the written verdict; each run gets an equal share of it.
        settings: Settings with a dotted name.
        test: Labelled images for the verdict, if the data have no test split.
        device: Device of the runs, or "auto".
        workers: Number of data workers.
        quiet: Print no progress.
        **fields: Any setting of the recipe (epochs=5, batch_size=64, ...).

    Returns:
        The content of verdict.json: "verdict" (helped, not shown, did not help), "sentence", the gains of k-NN, linear
        probe and measures without labels, and "recommended": the weights to use, which DIR/encoder holds.

    Raises:
        ConfigError, DataError, TrainingError, Preempted, Interrupted, Unwritten: See `inbatch.errors`.
    """
    check_whole("seeds", seeds, least=1)
    data, began = joined_paths(data), tuning.command_began()
    requested = merged_settings(method, None, settings, fields)
    if "seed" in requested:
        raise ConfigError("an adaptation trains with the seeds 0, 1, ...: leave out seed, and set their number (seeds)")
    total, place = requested.get("budget") if budget is None else budget, device_for(device)
    if total is not None:
        requested["budget"] = total = parse_budget(total)
        check_budget(total, seeds)
    chosen = training_settings(requested, starting_settings(weights))
    check_one_length(chosen)
    with process_group(None, place.type):
        plan = plan_without_budget(data, {key: x for key, x in chosen.items() if key != "budget"})
        split = evaluation_split(plan.recipe, plan.source, plan.data, test)
        facts: dict[str, Any] = {"seeds": seeds} if total is not None else {}
        facts |= {"data": plan.recipe.data, "images": plan.source.signature(), "from": str(weights), "settings": chosen}
        facts |= requested_test(test)
        folder = _prepare_folder(out, plan.recipe.data, facts)
        each = {key: value for key, value in chosen.items() if key != "own"}  # every run writes it itself
        if total is not None:
            each["budget"] = _agreed_share(
                folder, facts, lambda: planned_share(total, seeds, began, plan.recipe, split, place)
            )
        runs = []
        for seed in range(seeds):
            with progress(quiet) as (notify, _):
                if distributed.rank() == 0:
                    notify(f"Seed {seed + 1} of {seeds}: {folder / f'seed-{seed}'}")
            runs.append(
                _load_or_train(folder / f"seed-{seed}", data, each | {"seed": seed}, test, device, workers, quiet)
            )
        result = None
        if distributed.rank() == 0:
            result = _evaluate_runs(folder, runs, split, plan.source, place)
            result |= {"from": str(weights), "seconds": time.perf_counter() - began}
            if total is not None:
                with progress(quiet) as (notify, _):
                    notify(f"Budget of {duration(total)}: this command took {duration(result['seconds'])}.")
            try:
                write_json(folder / VERDICT, result)
            except InbatchError as error:
                raise Unwritten(str(error), result) from error
        return distributed.broadcast_object(result)


def _agreed_share(folder: Path, facts: dict[str, Any], plan: Callable[[], float]) -> float:
    """Return the seconds of each run with a budget: as an earlier call in this folder planned them, or `plan()`."""
    share, problem = 0.0, ""
    if distributed.rank() == 0:
        try:
            share = read_json(folder / REQUEST).get(SHARE) or plan()
            write_json(folder / REQUEST, facts | {SHARE: share})
        except ConfigError as error:
            problem = str(error)
    share, problem = distributed.broadcast_object((share, problem))
    if problem:
        _remove_request(folder)
        raise ConfigError(problem)
    return share


def _prepare_folder(out: str | Path | None, data: str, facts: dict[str, Any]) -> Path:
    """Return the directory of an adaptation, with its request; refuse the directory of another one.

    Args:
        out: Requested directory; None for a new one in runs/.
        data: Name of the data.
        facts: What the adaptation does.
    """
    folder = None if out is None else path_of(out, "out")
    problem = None
    if distributed.rank() == 0:
        if folder is None:
            name = "".join(c if c.isalnum() or c in ".-" else "-" for c in Path(data).name).strip("-") or "data"
            folder = claim(numbered(Path("runs") / f"adapt-{name}"))
        problem = _begin(folder, facts)
    folder, problem = distributed.broadcast_object((str(folder), problem))
    if problem:
        raise ConfigError(problem)
    return Path(folder)


def _begin(folder: Path, facts: dict[str, Any]) -> str | None:
    """Write the request of a new adaptation; return a sentence if the directory holds something else."""
    if not (folder / REQUEST).exists():
        for name in ("recipe.json", "encoder", VERDICT):
            if (folder / name).exists():
                return f"{folder} holds {name}, which an adaptation would replace: choose another --output-dir"
        write_json(folder / REQUEST, facts)
        return None
    stored = {key: value for key, value in read_json(folder / REQUEST).items() if key != SHARE}
    requested = _plain(facts)
    if stored == requested:
        return None
    before, after = ({**one.pop("settings", {}), **one} for one in (dict(stored), dict(requested)))
    keys = [key for key in dict.fromkeys((*before, *after)) if before.get(key) != after.get(key)]
    what = ", ".join(f"{key} = {after.get(key)!r:.80} (it has {before.get(key)!r:.80})" for key in keys)
    return f"{folder} holds another adaptation: {what}. Repeat its settings, or choose another --output-dir"


def _remove_request(folder: Path) -> None:
    """Remove the request of an adaptation of which no run has begun, so that other settings can be tried."""
    if distributed.rank() == 0 and not list(folder.glob("seed-*/recipe.json")):
        (folder / REQUEST).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            folder.rmdir()


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """Return values as a JSON file holds them."""
    plain: dict[str, Any] = json.loads(to_json(facts))
    return plain


def _load_or_train(
    folder: Path, data: Any, settings: dict[str, Any], test: Any, device: str, workers: int | None, quiet: bool
) -> Run:
    """Return a finished run, trained now as far as it is not."""
    if (folder / "result.json").is_file():
        return load_run(folder)
    try:
        return pretrain(
            data, out=folder, settings=settings, test=test, resume=True, device=device, workers=workers, quiet=quiet
        )
    except (Preempted, Interrupted) as error:
        again = f"Repeat the command with --output-dir {folder.parent} to continue the adaptation"
        raise type(error)(f"{error}. {again}") from None  # without the option it would begin another one
    except InbatchError:
        _remove_request(folder.parent)
        raise


def _hash(folder: Path) -> str:
    """Return the SHA-256 of the weights of an encoder's folder, as its config.json states it."""
    file = folder / "config.json"
    return str(object_in(read_json(file), "inbatch", file)["sha256"])


def _evaluate_runs(
    folder: Path, runs: Sequence[Run], split: EvaluationSplit | None, source: Source, device: torch.device
) -> dict[str, Any]:
    """Write the recommended encoder; return the content of verdict.json."""
    start = load_encoder(runs[0].directory / "initial")
    accuracy, images = {}, 0
    if split is not None:
        split = _limit_images(split, runs)
        before = [measure_hits(start, split, runs[0].recipe, device)]
        for run in runs[1:]:  # the weights at --from can have changed between two calls
            own = load_encoder(run.directory / "initial")
            before.append(before[0] if _equal_weights(own, start) else measure_hits(own, split, run.recipe, device))
        after = [measure_hits(load(run.directory), split, run.recipe, device) for run in runs]
        images = len(after[0].knn)
        for name in ("knn", "linear"):
            accuracy[name] = accuracy_gain(*(torch.stack([getattr(one, name) for one in x]) for x in (before, after)))
    measures = {name: _measure(runs, name) for name in runs[0].result["unlabelled"]}
    collapsed = [i for i, run in enumerate(runs) if run.result["collapsed"]]
    verdict = Verdict(accuracy, measures, collapsed, len(runs), images)
    helped, chosen = verdict.kind == HELPED, runs[verdict.best].directory
    fit_readout(start, source if split is None else split.bank)
    save_encoder(load(chosen) if helped else start, folder / "encoder")
    use = f"the weights of {chosen}" if helped else "those that it started from"
    sentence = f"{verdict.sentence()}. Use {use}: {folder / 'encoder'}"
    initial_hashes = [_hash(run.directory / "initial") for run in runs]
    if len(set(initial_hashes)) > 1:
        sentence += ". The seeds started from different weights: those at --from have changed between two calls"
    return verdict.json() | {
        "sentence": sentence,
        "exit_code": TrainingError.exit_code if verdict.kind == NO_HELP else 0,
        "recommended": {
            "weights": "adapted" if helped else "initial",
            "encoder": str(folder / "encoder"),
            "run": str(chosen) if helped else None,
        },
        "held_out": split and split.description,
        "runs": [str(run.directory) for run in runs],
        "initial_sha256": initial_hashes,
        "recipe": runs[0].recipe.nested(),
    }


def _measure(runs: Sequence[Run], name: str) -> Gain:
    """Return the gain in a measure without labels."""
    measures = [run.result["unlabelled"][name] for run in runs]
    return measure_gain(
        [one["untrained"] for one in measures], [one["trained"] for one in measures], measures[0]["better"]
    )


def _limit_images(split: EvaluationSplit, runs: Sequence[Run]) -> EvaluationSplit:
    """Return as many images as every run was evaluated on: fewer if its budget was short."""
    sizes = [[run.result["evaluation"][part]["images"] for part in ("train", "test")] for run in runs]
    unread = [[run.result["evaluation"][part].get("unreadable", 0) for part in ("train", "test")] for run in runs]
    bank, queries = (
        min(a + b for a, b in zip(x, y, strict=True))
        for x, y in zip(zip(*sizes, strict=True), zip(*unread, strict=True), strict=True)
    )
    return limited(split, bank, queries)


def _equal_weights(a: Encoder, b: Encoder) -> bool:
    """Return whether two encoders of the same kind have the same weights in their backbones."""
    pairs = zip(a.backbone.state_dict().values(), b.backbone.state_dict().values(), strict=True)
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in pairs)
