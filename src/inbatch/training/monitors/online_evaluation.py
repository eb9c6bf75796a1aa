"""Online and final evaluation: collapse, leaks between context groups, k-NN, and the figures of every protocol."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from inbatch.data import Source, Subset
from inbatch.evaluation import (
    Embeddings,
    Kept,
    alpha_req,
    embed,
    evaluate,
    feature_std,
    hold_in_memory,
    knn,
    rankme,
    readable,
    sigreg_distance,
)
from inbatch.models import Encoder
from inbatch.rng import permutation
from inbatch.runtime import distributed, shared_work
from inbatch.runtime.spacing import spaced
from inbatch.training.build import RunComponents
from inbatch.training.head_evaluation import evaluate_head
from inbatch.training.holdout import EvaluationSplit, Images
from inbatch.training.metric_logger import Log
from inbatch.training.monitors.collapse import SETTLED, output_diversity, signs
from inbatch.training.monitors.comparison import Comparison
from inbatch.training.monitors.context_leak import leak, mixes_samples, sign
from inbatch.training.monitors.curve_plot import plot_curves
from inbatch.training.monitors.label_free import Chosen, embed_views, lidar_of
from inbatch.training.recipe import Recipe
from inbatch.training.train_state import TrainState

BANK, QUERIES = 10_000, 2_000
"""Numbers of images for online evaluation of streamed data: the first step must not wait for a million of them."""

MEASURED = 2048
"""Number of images whose features are measured without labels."""

OnlineEvaluator = Callable[[], dict[str, float]]


def choose_online_subsets(built: RunComponents, split: EvaluationSplit) -> tuple[EvaluationSplit, EvaluationSplit]:
    """Return the data of online evaluation and of the final one; images that are used repeatedly are kept in memory.

    Online evaluation uses all images if they are resident and there is no budget, else a fixed sample of limited size.
    """

    def online_and_final(images: Images, most: int) -> tuple[Images, Images]:
        budget = built.recipe.budget is not None  # online evaluation counts towards the budget
        if len(images) <= most or (built.loader.held is not None and not budget):
            kept = hold_in_memory(images)
            return kept, kept
        return hold_in_memory(fixed_sample(images, most)), images

    online_bank, bank = online_and_final(split.bank, BANK)
    online_queries, queries = online_and_final(split.queries, QUERIES)
    return replace(split, bank=online_bank, queries=online_queries), replace(split, bank=bank, queries=queries)


def affordable(built: RunComponents, split: EvaluationSplit, seconds: float) -> EvaluationSplit:
    """Return as many of the evaluation images as one evaluation can embed in this many seconds, or all of them.

    The sample is the same for each call; the description states what is omitted.
    """
    queries = split.queries
    sample = subset(queries, spaced(len(queries), 128), "timed")
    _embedded(built, sample)  # warm-up
    began = time.perf_counter()
    _embedded(built, sample)
    each = (time.perf_counter() - began) / len(sample)
    most = int(seconds / each)
    if len(split.bank) + len(queries) <= most:
        return split
    return limited(split, max(100, most * 5 // 6), max(50, most // 6))


def limited(split: EvaluationSplit, bank: int, queries: int) -> EvaluationSplit:
    """Return at most this many evaluation images, the same for each call; the description states an omission."""
    part = EvaluationSplit(fixed_sample(split.bank, bank), fixed_sample(split.queries, queries), split.description)
    if len(part.bank) == len(split.bank) and len(part.queries) == len(split.queries):
        return split
    sizes = f"{len(part.bank):,} images and {len(part.queries):,} of it"
    return replace(part, description=f"{split.description}; {sizes}, as the budget is short")


def fit_readout(encoder: Encoder, source: Images, again: bool = False) -> None:
    """Fit the whitening of an encoder's features on at most 10,000 images, if it has one that is not yet fitted.

    Args:
        encoder: The encoder.
        source: Images to fit to.
        again: Fit also if it is already fitted, to features that have changed since.
    """
    readout = getattr(encoder, "readout", None)  # encoders from outside the package have none
    if readout is not None and (again or not int(readout.images)):
        embed_bank(encoder, fixed_sample(source, BANK))


def embed_bank(encoder: Encoder, source: Images, **options: Any) -> Embeddings:
    """Embed images and, if the encoder whitens its features, fit the whitening to them; no label is used.

    Subsequently embedded images are whitened with the same statistics.
    """
    if encoder.readout is None:
        return embed(encoder, source, **options)
    encoder.readout.forget()
    embeddings = embed(encoder, source, **options)
    encoder.readout.fit(embeddings.vectors)
    return replace(embeddings, vectors=encoder.readout.whitened(embeddings.vectors.to(encoder.device)).cpu())


def _embedded(built: RunComponents, source: Images) -> Embeddings:
    return embed(built.encoder, source, precision=built.network.precision)


def fixed_sample(source: Images, most: int) -> Images:
    """Return at most this many images of a source, the same for each call."""
    if len(source) <= most:
        return source
    return subset(source, permutation(1, 0, len(source))[:most].sort().values, "for the online evaluation")


def subset(source: Images, indices: Tensor, why: str) -> Subset:
    """Return these images of a source; they are decoded again if they were kept in memory."""
    whole = source.source if isinstance(source, Kept) else source
    assert isinstance(whole, Source)
    return Subset(whole, indices, why)


def check_collapse(built: RunComponents, watched: Subset, progress: TrainState, epoch: int, log: Log) -> None:
    """Measure on rank 0 how different the outputs of some images are; report a collapse, and the recovery from it."""
    if distributed.rank() and built.whole is None:
        return
    images = built.encoder.prepare(readable(watched, range(len(watched))))
    now = output_diversity(built.network, images.to(built.loader.device))  # a sharded network is computed by all ranks
    if distributed.rank():
        return
    log.record(progress.step, now)
    progress.most = {measure: max(value, progress.most.get(measure, 0.0)) for measure, value in now.items()}
    if progress.step < SETTLED:
        return
    collapsed = signs(now, progress.most, classes=built.method.labels)
    for measure, sentence in collapsed.items():
        if measure not in progress.collapsed:
            log.note(f"epoch {epoch}: {sentence}")
    for measure in progress.collapsed.keys() - collapsed:
        log.note(f"epoch {epoch}: {measure} has recovered: {now[measure]:.2g}.")
    progress.collapsed = collapsed


def check_leak(built: RunComponents, progress: TrainState, epoch: int, log: Log) -> None:
    """Log whether an embedding identifies its group, if samples interact before the loss."""
    figures = leak(built, epoch) if mixes_samples(built) else {}
    if figures:
        progress.leak = figures
        log.record(progress.step, figures)
        if sentence := sign(figures, built.recipe.shuffle_groups):
            log.note(f"epoch {epoch}: {sentence}")


def make_online_evaluator(built: RunComponents, split: EvaluationSplit | None) -> OnlineEvaluator:
    """Return a function that evaluates features: k-NN with labels, and the measures that need none.

    LiDAR is that of views of some of the training images, everything else that of clean images.
    """
    seed, source, readout = built.recipe.seed, built.loader.source, built.encoder.readout
    sample = Chosen(source, built.loader.held, seed)
    if split is not None:
        images = split.bank
    else:  # a sample, because the source may be sorted, such as by folder, and features are whitened by these images
        images = hold_in_memory(fixed_sample(source, MEASURED if readout is None else max(MEASURED, 4 * readout.width)))

    def evaluate_features() -> dict[str, float]:
        figures = evaluate_clean()
        precision = built.network.precision
        viewed = embed_views({"it": built.encoder}, built.views, sample, seed, precision=precision)["it"]
        return figures | {"lidar": lidar_of(viewed)}

    def evaluate_clean() -> dict[str, float]:
        options: dict[str, Any] = {"precision": built.network.precision, "workers": built.loader.workers}
        bank = embed_bank(built.encoder, images, **options)
        if split is None:
            return _feature_measures(built.encoder, bank.vectors)
        queries = embed(built.encoder, split.queries, **options)
        measures = _feature_measures(built.encoder, queries.vectors)
        bank = bank.labelled()
        near = knn(bank, queries, k=min(built.recipe.knn_k, len(bank)), device=built.loader.device)
        return {"knn": near["top1"]} | measures

    return evaluate_features


def _feature_measures(encoder: Encoder, rows: Tensor) -> dict[str, float]:
    """Return how different and how normal features are, and how their spectrum decays, before any whitening."""
    plain = rows if encoder.readout is None else encoder.readout.unwhitened(rows)
    sample = plain[spaced(len(plain), MEASURED)]  # they may be sorted by class
    return {
        "feature_std": float(feature_std(plain)), "rankme": float(rankme(sample)), "alpha": float(alpha_req(sample)),
        "sigreg_distance": float(sigreg_distance(sample)),
    }  # fmt: skip


def record_online(figures: dict[str, float], progress: TrainState, epoch: int, log: Log, steps: int) -> bool:
    """Store and log the figures of an online evaluation; return whether they are the best so far.

    The curve also receives the mean loss; the log has that of single steps.

    Args:
        figures: Figures of the online evaluation, on every rank.
        progress: Training state; the curve and the best value are stored there.
        epoch: Number of epochs, the last one possibly incomplete.
        log: Log of the run.
        steps: Steps per epoch.
    """
    loss = distributed.broadcast_object(progress.mean_loss())
    done = epoch if progress.step == epoch * steps else progress.step / steps
    progress.curve.append({"step": progress.step, "epoch": done} | loss | figures)
    log.evaluation(progress.step, figures)
    best = figures.get("knn", -math.inf) > progress.best
    progress.best = max(progress.best, figures.get("knn", -math.inf))
    return best


def evaluation_epochs(recipe: Recipe) -> list[int]:
    """Return the epochs after which the features are evaluated."""
    return sorted({*range(0, recipe.epochs, recipe.evaluate_every), recipe.epochs})


def report_comparison(compared: Comparison | None, out: Path, log: Log) -> None:
    """Report measures that have left the band of the reference or returned to it, and plot both curves."""
    if compared is None:
        return
    for sentence in compared.new_sentences():
        log.note(sentence)
    plot_curves(out / "metrics.jsonl", out / "curves.png", compared)
    log.reset_throughput()


def evaluation(built: RunComponents, split: EvaluationSplit, out: Path) -> dict[str, Any]:
    """Return the figures of every protocol, and of the head that assigns clusters if the method has one."""
    options: dict[str, Any] = {"k": built.recipe.knn_k, "seed": built.recipe.seed, "workers": built.loader.workers}
    figures = evaluate(built.encoder, split.bank, split.queries, **options)
    if built.method.assigns and distributed.rank() == 0:  # the files of the head need not be seen by other machines
        with shared_work.alone():
            figures["head"] = evaluate_head(out, built.encoder, split.queries, workers=built.loader.workers)
    return figures
