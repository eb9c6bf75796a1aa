"""Hits of an encoder on test images, on which the verdict rests, by the protocol of `evaluate`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from inbatch.evaluation import embed, knn_scores
from inbatch.evaluation.accuracy import hit_shares
from inbatch.evaluation.embeddings import matched
from inbatch.evaluation.knn import equal_scores
from inbatch.evaluation.linear_probe import fit
from inbatch.models import Encoder
from inbatch.training.holdout import EvaluationSplit
from inbatch.training.monitors.online_evaluation import fit_readout
from inbatch.training.recipe import Recipe

TEMPERATURE = 0.1
"""Temperature of k-NN, that of `evaluate`."""
BATCH = 512
"""Images that are embedded at once."""


@dataclass(frozen=True)
class Hits:
    """Hits of an encoder on every test image, (N,) from 0 to 1."""

    knn: Tensor
    linear: Tensor


def measure_hits(encoder: Encoder, split: EvaluationSplit, recipe: Recipe, device: torch.device) -> Hits:
    """Return the hits of k-NN and of the linear probe, with the neighbours and the seed of a run's recipe."""
    encoder = encoder.to(device)
    fit_readout(encoder, split.bank)
    bank, queries, classes = matched(
        embed(encoder, split.bank, batch=BATCH), embed(encoder, split.queries, batch=BATCH)
    )
    vectors, near = bank.vectors.to(device), min(recipe.knn_k, len(bank))
    scores = knn_scores(queries.vectors.to(device), vectors, bank.labels, classes, k=near, temperature=TEMPERATURE)
    probe = fit(bank, classes, seed=recipe.seed, device=device)
    return Hits(
        hit_shares(scores, queries.labels, equal=equal_scores(TEMPERATURE, "cosine")),
        hit_shares(probe.scores(queries.vectors), queries.labels),
    )
