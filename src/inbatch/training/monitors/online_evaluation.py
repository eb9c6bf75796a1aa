"""What is looked at on the way, and when a run ends: collapse, leaks between groups, k-NN, every protocol's figures."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inbatch.data import Source, Subset
from inbatch.evaluation import Embeddings, embed, evaluate, feature_std, hold_in_memory, knn, rankme, readable
from inbatch.models import Encoder
from inbatch.rng import permutation
from inbatch.runtime import distributed
from inbatch.training.build import RunComponents
from inbatch.training.head_evaluation import HeadRows, judge_head
from inbatch.training.metric_logger import Log
from inbatch.training.monitors.collapse import SETTLED, signs, spread
from inbatch.training.monitors.comparison import Comparison
from inbatch.training.monitors.context_leak import leak, meets, sign
from inbatch.training.monitors.curve_plot import plot_curves
from inbatch.training.recipe import Recipe
from inbatch.training.train_state import TrainState

BANK, QUERIES = 10_000, 2_000
"""Images that are judged on the way where they are streamed: the first step must not wait for a million of them."""

Judge = Callable[[], dict[str, float]]
Held = tuple[Any, Any, str]
"""Bank, queries and their description, from `build.held_out`."""


def choose_online_subsets(built: RunComponents, held: Held) -> tuple[Held, Held]:
    """What is judged on the way, and what at the end; images that are looked at again and again are kept in memory.

    On the way that is everything if images are resident and there is no budget, else so many, the same ones each time.
    """

    def some(source: Source, most: int) -> tuple[Any, Any]:
        budget = built.recipe.budget is not None  # looks take their time from it
        if len(source) <= most or (built.loader.held is not None and not budget):
            kept = hold_in_memory(source)
            return kept, kept
        return hold_in_memory(fixed_sample(source, most)), source

    (bank, whole_bank), (queries, whole_queries) = some(held[0], BANK), some(held[1], QUERIES)
    return (bank, queries, held[2]), (whole_bank, whole_queries, held[2])


def affordable(built: RunComponents, held: Held, seconds: float) -> Held:
    """Return as many of the images to judge by as one evaluation can embed in so many seconds; all of them if it can.

    The same images each time; what is left out stands in the description.
    """
    bank, queries, _ = held
    few = torch.linspace(0, len(queries) - 1, min(128, len(queries))).long()
    sample = Subset(queries, few, "timed")
    _embedded(built, sample)  # warms up
    began = time.perf_counter()
    _embedded(built, sample)
    each = (time.perf_counter() - began) / len(few)
    most = int(seconds / each)
    if len(bank) + len(queries) <= most:
        return held
    return limited(held, max(100, most * 5 // 6), max(50, most // 6))


def limited(held: Held, bank: int, queries: int) -> Held:
    """At most so many of the images to judge by, the same ones each time; the description says if some are left out."""
    some, few = fixed_sample(held[0], bank), fixed_sample(held[1], queries)
    if len(some) == len(held[0]) and len(few) == len(held[1]):
        return held
    return some, few, f"{held[2]}; {len(some):,} images and {len(few):,} of it, as the budget is short"


def fit_readout(encoder: Encoder, source: Source, again: bool = False) -> None:
    """Fit what whitens an encoder's features, if anything does and it is not fitted yet, on at most 10,000 images.

    again: also if it is fitted: to features that have changed since.
    """
    readout = getattr(encoder, "readout", None)  # an encoder of somebody else has none
    if readout is not None and (again or not int(readout.images)):
        embed_bank(encoder, fixed_sample(source, BANK))


def embed_bank(encoder: Encoder, source: Source, **options: Any) -> Embeddings:
    """Embed images and fit what whitens the encoder's features on them, if anything does; no label is used.

    The images that are judged next are then whitened by the same statistics.
    """
    if encoder.readout is None:
        return embed(encoder, source, **options)
    encoder.readout.forget()
    found = embed(encoder, source, **options)
    encoder.readout.fit(found.vectors)
    return replace(found, vectors=encoder.readout.whitened(found.vectors.to(encoder.device)).cpu())


def _embedded(built: RunComponents, source: Source) -> Any:
    return embed(built.encoder, source, precision=built.network.precision)


def fixed_sample(source: Source, most: int) -> Source:
    """At most so many images of a source, the same ones each time."""
    if len(source) <= most:
        return source
    return Subset(source, permutation(1, 0, len(source))[:most].sort().values, "judged on the way")


def check_collapse(built: RunComponents, watched: Subset, progress: TrainState, epoch: int, log: Log) -> None:
    """See on rank 0 how different the outputs of some images are; say when they collapse, and when no longer."""
    if distributed.rank():
        return
    images = built.encoder.prepare(readable(watched, range(len(watched))))
    now = spread(built.network, images.to(built.loader.device))
    log.record(progress.step, now)
    progress.most = {measure: max(value, progress.most.get(measure, 0.0)) for measure, value in now.items()}
    if progress.step < SETTLED:
        return
    found = signs(now, progress.most, classes=built.method.labels)
    for measure, sentence in found.items():
        if measure not in progress.collapsed:
            log.note(f"epoch {epoch}: {sentence}")
    for measure in progress.collapsed.keys() - found:
        log.note(f"epoch {epoch}: {measure} has recovered: {now[measure]:.2g}.")
    progress.collapsed = found


def check_leak(built: RunComponents, progress: TrainState, epoch: int, log: Log) -> None:
    """Where samples meet before the loss: log whether an embedding tells its group."""
    found = leak(built, epoch) if meets(built) else {}
    if found:
        progress.leak = found
        log.record(progress.step, found)
        if sentence := sign(found, built.recipe.shuffle_groups):
            log.note(f"epoch {epoch}: {sentence}")


def survey(built: RunComponents, epoch: int) -> dict[str, float]:
    """Show the method the rows of the whole data set: clean images, in evaluation mode, each rank a share of them."""
    network, source, world = built.target or built.network, built.loader.source, distributed.world()
    label, n = source.labels, len(source)
    mine = torch.arange(distributed.rank(), n + -n % world, world) % n  # the same number on every rank
    seen = Subset(source, mine, "this rank's share")
    rows = {}
    for name in network.reads:
        found = embed(HeadRows(network, built.encoder, name), seen, workers=built.loader.workers)
        # An image that cannot be read is never learned from: its row may be any, here that of the one behind it.
        share = found.vectors[torch.searchsorted(found.index, torch.arange(len(seen))).clamp(max=len(found) - 1)]
        whole = distributed.gather(share.to(built.loader.device)[:, None], dim=1).flatten(0, 1)
        rows[name] = whole[:n].cpu()
    return built.method.survey(rows, label.cpu(), epoch, distributed.distribute_tasks)


def make_online_evaluator(built: RunComponents, held: Any) -> Judge:
    """Look at the features of clean images: k-NN where there are labels, and whether they collapse."""

    def look() -> dict[str, float]:
        options: dict[str, Any] = {"precision": built.network.precision, "workers": built.loader.workers}
        if held is None:
            most = 2048 if built.encoder.readout is None else 4 * built.encoder.readout.width
            few = torch.arange(min(most, len(built.loader.source)))
            watched = Subset(built.loader.source, few, "to watch the features")
            return _spread(built.encoder, embed_bank(built.encoder, watched, **options).vectors[:2048])
        bank, queries = embed_bank(built.encoder, held[0], **options), embed(built.encoder, held[1], **options)
        found = _spread(built.encoder, queries.vectors)
        bank, queries = bank.labelled(), queries.labelled()
        near = knn(bank, queries, k=min(built.recipe.k, len(bank)), device=built.loader.device)
        return {"knn": near["top1"]} | found

    return look


def _spread(encoder: Encoder, rows: Tensor) -> dict[str, float]:
    """How different features are, before they are whitened if that is done to them."""
    plain = rows if encoder.readout is None else encoder.readout.unwhitened(rows)
    return {"feature_std": float(feature_std(plain)), "rankme": float(rankme(plain[:2048]))}


def evaluate_online(judge: Judge, progress: TrainState, epoch: int, log: Log, steps: int) -> bool:
    """Judge the features on rank 0, remember and log it; whether they are the best so far.

    The curve gets the mean loss, too: the log has that of single steps. steps: of an epoch, for one that is not whole.
    """
    loss, found = distributed.broadcast_object((progress.mean_loss(), judge() if distributed.rank() == 0 else {}))
    done = epoch if progress.step == epoch * steps else progress.step / steps
    progress.curve.append({"step": progress.step, "epoch": done} | loss | found)
    log.evaluation(progress.step, found)
    best = found.get("knn", -math.inf) > progress.best
    progress.best = max(progress.best, found.get("knn", -math.inf))
    return best


def evaluation_epochs(recipe: Recipe) -> list[int]:
    """The epochs after which the features are judged."""
    return sorted({*range(0, recipe.epochs, recipe.evaluate_every), recipe.epochs})


def report_comparison(compared: Comparison | None, out: Path, log: Log) -> None:
    """After a look, where a run is compared: say what has left the reference's band or come back, and draw both."""
    if compared is None:
        return
    for sentence in compared.news():
        log.note(sentence)
    plot_curves(out / "metrics.jsonl", out / "curves.png", compared)
    log.reset_throughput()


def evaluation(built: RunComponents, held: Any, out: Path) -> dict[str, Any]:
    """The figures of every protocol, and of the head that assigns clusters where the method has one."""
    bank, queries, _ = held
    options: dict[str, Any] = {"k": built.recipe.k, "seed": built.recipe.seed, "workers": built.loader.workers}
    found = evaluate(built.encoder, bank, queries, **options)
    if built.method.assigns:
        found["head"] = judge_head(out, built.encoder, queries, workers=built.loader.workers)
    return found
