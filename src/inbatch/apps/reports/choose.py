"""Rank runs without labels, by the measures of their last checkpoint or on images of one's own."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from inbatch.apps.reports.choose_interval import resampled, undecided, with_intervals
from inbatch.apps.reports.choose_study import Reliability, reliability
from inbatch.data.views import Views, make_views
from inbatch.errors import ConfigError, DataError, check_whole, listed, many, not_a_run, type_name
from inbatch.evaluation import alpha_req, embed, feature_std, knn, rankme
from inbatch.evaluation.embeddings import Embeddings
from inbatch.evaluation.rank_correlation import kendall_tau
from inbatch.models import Encoder
from inbatch.rng import permutation
from inbatch.runtime.device import device_for
from inbatch.runtime.files import read_json
from inbatch.runtime.isolation import isolated
from inbatch.runtime.paths import path_of
from inbatch.runtime.remote import public
from inbatch.training import checkpoint
from inbatch.training.monitors.label_free import Chosen, embed_views, lidar_of, same_image
from inbatch.training.run import recipe_of
from inbatch.training.run_embedding import images_for
from inbatch.training.run_encoder import load_run_encoder

SCORES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "rankme": lambda entry: entry["rankme"],
    "lidar": lambda entry: entry["lidar"],
    "alpha": lambda entry: -abs(entry["alpha"] - 1),
    "std": lambda entry: entry["feature_std"],
    "loss": lambda entry: -entry["loss"],
    "same_image": lambda entry: entry["same_image"],
}
"""Measure -> its score from an entry of a curve; a higher score is recommended."""
ON_DATA, ONE_METHOD, OTHERWISE = "same_image", "loss", "rankme"
"""Defaults: with images, and for recorded runs of one method, what the study supports; for other recorded runs."""
IMAGES, NEIGHBOURS = 2_000, 20
PAGE = "docs/choose.md"
DIFFERENT = {
    "method": "between methods no measure ordered runs in both parts of the study",
    "encoder": "their measures are not comparable in general",
    "width": "RankMe and LiDAR are at most the width, so the order may be that of the widths",
}
"""What differs between runs -> what the study shows on it."""


@isolated
def choose_run(
    runs: Sequence[str | Path], *, by: str | None = None, data: Any = None, seed: int = 0, device: str = "auto",
    quiet: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Rank runs by a measure without labels, and recommend the first.

    Without `data`, the measures are those of the last online evaluation, as the run recorded them: of its own images
    and views. With `data`, every encoder embeds the same images and the same views.

    Args:
        runs: Run directories, finished or stopped; with `data` also encoders' folders.
        by: rankme, lidar, alpha, std, loss or same_image; None for what the study supports: same_image with `data`, the
            loss of recorded runs of one method, and RankMe of other recorded runs.
        data: Images on which all encoders are measured; None for the recorded measures.
        seed: Seed of the choice of images and of the views, with `data`.
        device: Device on which features are computed, or "auto".
        quiet: Report no progress.

    Returns:
        "recommended": the first run. "runs": all runs, best first, each with "rank" (equal for equal scores),
        "score" and the measures. With `data` also "low" and "high", the 95 % interval of the score over the images, and
        the "difference" from the score of the first run with its interval.
        "reliability": how well the measure ordered runs in the study. "kendall_tau": of every measure with k-NN, None
        without labels. "notes": what limits the comparison.

    Raises:
        ConfigError: For fewer than two runs, an unknown measure, a measure that a run has not recorded, or a run
            without a checkpoint.
        DataError: If a file of a run or the images cannot be read.
    """
    if by is not None and by not in SCORES:
        raise ConfigError(f"unknown measure {by!r}: choose {', '.join(SCORES)}")
    check_whole("seed", seed, 0)
    paths = [path_of(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    if len(paths) < 2:
        raise ConfigError(f"choosing needs at least two runs, not {len(paths)}: pass their directories")
    if len(same := {path.resolve() for path in paths}) < len(paths):
        raise ConfigError(f"of {len(paths)} runs only {len(same)} differ: pass each directory once")
    if data is None and by == "same_image":
        raise ConfigError("same_image needs the same views for all runs: pass --data, or choose another --by")
    if data is not None and by == "loss":
        raise ConfigError("the loss is known of training data only: leave out --data, or choose another --by")
    measure = recorded if data is None else partial(on_data, by=by or ON_DATA, data=data, seed=seed, device=device)
    measured = [_named(path, measure) for path in paths]
    by = by or (_default(measured) if data is None else ON_DATA)
    for one in measured:
        if not math.isfinite(score_of(by, one)):
            raise ConfigError(f"{one['run']} has no value of {by}: {_missing(by, data is not None)}")
    ranked = sorted(measured, key=lambda one: -score_of(by, one))
    scores = [score_of(by, one) for one in ranked]
    ranked = [{"rank": 1 + scores.index(score)} | one | {"score": score}
              for one, score in zip(ranked, scores, strict=True)]  # fmt: skip
    if data is not None:
        ranked = with_intervals(ranked)
    study = reliability(by, sorted({one["method"] for one in ranked if one["method"]}))
    return {
        "by": by, "recommended": ranked[0]["run"], "reliability": study.sentence, "runs": ranked,
        "data": public(str(data)) if isinstance(data, str | Path) else None if data is None else type_name(data),
        "kendall_tau": _taus(ranked), "notes": _notes(by, ranked, study, data),
    }  # fmt: skip


def _named(path: Path, measure: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Return the measures of a run; an error that does not name the run gets its name."""
    try:
        return measure(path)
    except (ConfigError, DataError) as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from None


def _default(measured: Sequence[Mapping[str, Any]]) -> str:
    """Return the measure for runs that the user names none for."""
    one_method = len({one["method"] for one in measured}) == 1
    return ONE_METHOD if one_method and all(one["loss"] is not None for one in measured) else OTHERWISE


def score_of(by: str, one: Mapping[str, Any]) -> float:
    """Return the score of a run, higher is better; nan if it has no value of the measure."""
    try:
        return float(SCORES[by](one))
    except (KeyError, TypeError):
        return math.nan


def recorded(path: Path) -> dict[str, Any]:
    """Return the measures of a run at its last online evaluation: from result.json, else from its last checkpoint."""
    if not (path / "recipe.json").is_file():
        if (path / "config.json").is_file():
            raise ConfigError(f"{path} is an encoder's folder, which has no record of a run: pass --data")
        raise not_a_run(path)
    recipe, file = recipe_of(path), path / "result.json"
    steps = note = None
    if file.is_file():
        result = read_json(file)
        curve, steps = result.get("curve"), result.get("steps")
        figures = result.get("evaluation")
        width = result.get("width") or (figures.get("width") if isinstance(figures, dict) else None)
    else:
        saved = checkpoint.load(path / "checkpoints", mapped=True)
        file, note, width = saved.path, f"{path} has not finished; its last evaluation is used", None
        curve = saved.state.get("progress", {}).get("curve")
    if not isinstance(curve, list) or not all(isinstance(entry, dict) for entry in curve):
        raise DataError(f"{file} cannot be read: its curve is not a list of evaluations; restore the file")
    if not curve:
        raise ConfigError(
            f"{path} was stopped before its first evaluation: continue it with inbatch pretrain --resume {path}"
        )
    names = ("step", "rankme", "lidar", "alpha", "feature_std", "loss", "knn")
    values = {name: curve[-1].get(name) for name in names}
    bad = [name for name, value in values.items() if value is not None and type(value) not in (int, float)]
    if bad:
        raise DataError(
            f"{file} cannot be read: {listed(bad)} is not a number at the last evaluation; restore the file"
        )
    origin = {
        "run": str(path), "method": recipe.method.name, "encoder": recipe.encoder.name, "width": width, "steps": steps,
        "images": [str(recipe.data), recipe.split, recipe.subset], "note": note,
        "objective": [recipe.method.options, recipe.batch_size, recipe.views.name, recipe.views.options],
    }  # fmt: skip
    return origin | values | {"same_image": None}


def on_data(path: Path, by: str, data: Any, seed: int, device: str) -> dict[str, Any]:
    """Return the measures of an encoder on images, with k-NN if these have labels, and resamples of the score `by`."""
    loaded = load_run_encoder(path)
    encoder = loaded.encoder.to(device_for(device))
    source = next(iter(images_for(path, encoder, data).values()))
    sample = Chosen(source, None, seed, IMAGES)
    with encoder.plain():
        clean = embed(encoder, sample)
    if len(clean) < 2:
        raise DataError(f"{source.name} has {many(len(clean), 'readable image')}: two are needed to compare runs")
    viewed = embed_views({"it": encoder}, common_views(encoder), sample, seed)["it"]
    first, second, *_ = F.normalize(viewed, dim=2).unbind(1)
    recipe = recipe_of(path) if (path / "recipe.json").is_file() else None
    same = (first @ second.T).argmax(1) == torch.arange(len(first))
    parts: dict[str, tuple[int, Callable[[Tensor], dict[str, float]]]] = {
        "rankme": (len(clean), lambda at: {"rankme": float(rankme(clean.vectors[at]))}),
        "alpha": (len(clean), lambda at: {"alpha": float(alpha_req(clean.vectors[at]))}),
        "std": (len(clean), lambda at: {"feature_std": float(feature_std(clean.vectors[at]))}),
        "lidar": (len(viewed), lambda at: {"lidar": lidar_of(viewed[at])}),
        "same_image": (len(viewed), lambda at: {"same_image": float(same[at].double().mean())}),
    }
    number, part = parts[by]
    return {
        "resampled": resampled(lambda at: score_of(by, part(at)), number, seed), "measured": number,
        "run": str(path), "method": recipe and recipe.method.name, "encoder": encoder.name,
        "width": clean.vectors.shape[1], "step": loaded.step, "steps": loaded.steps, "images": len(clean),
        "objective": None, "note": loaded.note, "rankme": float(rankme(clean.vectors)), "lidar": lidar_of(viewed),
        "alpha": float(alpha_req(clean.vectors)), "feature_std": float(feature_std(clean.vectors)), "loss": None,
        "same_image": same_image(first, second), "knn": _knn(encoder, clean, seed),
    }  # fmt: skip


def common_views(encoder: Encoder) -> Views:
    """Return views that are the same for all encoders up to their size: SimCLR's, for grey images without colour."""
    name = "simclr_cifar" if encoder.size <= 64 else "simclr"
    return Views(make_views(name, {"size": encoder.size}, encoder.channels), encoder.mean, encoder.std)


def _knn(encoder: Encoder, clean: Embeddings, seed: int) -> float | None:
    """Return the k-NN accuracy of a fifth of the labelled images among the others; None unless these have classes."""
    labelled = clean.labels.ndim == 1 and (clean.labels >= 0).nonzero()[:, 0]
    if labelled is False or len(labelled) < 10:
        return None
    if encoder.readout is not None and int(encoder.readout.images):  # its output is whitened
        clean = replace(clean, vectors=encoder.readout.whitened(clean.vectors.to(encoder.device)).cpu())
    order = labelled[permutation(seed, 1, len(labelled))]
    cut = len(order) // 5
    bank, queries = clean.take(order[cut:].sort().values), clean.take(order[:cut].sort().values)
    if len(bank.labels.unique()) < 2:  # all images, or all but a few of a rare class
        return None
    return float(knn(bank, queries, k=min(NEIGHBOURS, len(bank)))["top1"])


def _taus(ranked: Sequence[Mapping[str, Any]]) -> dict[str, float | None] | None:
    """Return Kendall's tau-b of every measure with k-NN over the runs; None if a run has no k-NN."""
    knns = [one["knn"] for one in ranked]
    if any(value is None for value in knns):
        return None
    taus = {by: [score_of(by, one) for one in ranked] for by in SCORES}
    return {by: kendall_tau(x, knns) if all(map(math.isfinite, x)) else None for by, x in taus.items()}


def _missing(by: str, on_data: bool) -> str:
    if on_data:
        return "too few images or features, or features that are not finite; choose another --by"
    older = "an older version made it" if by in ("lidar", "alpha") else "its last evaluation has none"
    return f"{older}; pass --data, or choose another --by"


def _notes(by: str, ranked: Sequence[Mapping[str, Any]], study: Reliability, data: Any) -> list[str]:
    """Return sentences on what limits the comparison of these runs."""
    notes = [str(one["note"]) for one in ranked if one["note"]]
    if len(first := [one["run"] for one in ranked if one["score"] == ranked[0]["score"]]) > 1:
        notes.append(f"{listed(first)} have the same value of {by}, which does not order them")
    for key, what in (("method", "methods"), ("encoder", "encoders"), ("width", "widths")):
        names = sorted({str(one[key]) for one in ranked if one[key] is not None})
        if len(names) > 1:
            notes.append(f"the runs have different {what} ({listed(names)}): {DIFFERENT[key]}")
    if data is None and len({json.dumps(one["images"]) for one in ranked}) > 1:
        notes.append("the runs were measured on different images: pass --data to measure them on the same")
    if by == "loss" and len({json.dumps(one["objective"]) for one in ranked}) > 1:
        notes.append(
            "the runs have different settings of the method, batch or views, which change the scale of the loss"
        )
    if data is not None:
        notes += undecided(ranked, by)
    if not study.supported:
        notes.append(f"the study does not support choosing by this measure: its interval is not above 0; see {PAGE}")
    return notes
