"""Mean average precision and recall at k: vectors, loops over all orders of ties, and what cannot be measured."""

import sys
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_vectors import Case
from torch import Tensor

from inbatch.apps.cli.output import evaluation_lines
from inbatch.errors import ConfigError, DataError
from inbatch.evaluation import Embeddings, evaluate, retrieval


def embeddings(vectors: Tensor, labels: list[int]) -> Embeddings:
    return Embeddings(vectors.float(), torch.tensor(labels), ("",) * len(vectors), "it", "features")


def test_vectors(golden: Path) -> None:
    case = Case(golden, "retrieval__1")
    ks = case.options["ks"]
    result: Any = retrieval(embeddings(case["z"], case["labels"].tolist()), ks)
    case.check(torch.tensor(result["map"], dtype=torch.float64), "mean_average_precision")
    relevant = case["query_ap"] > 0  # the public recall counts a query without a relevant row as a miss
    assert result["queries"] == int(relevant.sum()) == 39 and result["left_out"] == 1
    expected = case["query_hit"][relevant].mean(0).tolist()
    assert list(result["recall"].values()) == pytest.approx(expected, abs=1e-12)
    assert [40 * r for r in case["recall_at_k_hit"].tolist()] == pytest.approx([39 * r for r in expected])


def test_equally_similar_images_have_no_order() -> None:
    """Recall is the mean over all orders; average precision is that of scikit-learn."""
    from sklearn.metrics import average_precision_score

    rows = torch.tensor([[1.0, 0], [0.6, 0.8], [0.6, 0.8], [0.6, -0.8], [1, 0], [0.6, 0.8], [-1, 0]])
    labels = [0, 1, 0, 0, 1, 1, 0]
    result: Any = retrieval(embeddings(rows, labels), (1, 2, 3))
    precision, hits = [], {k: [] for k in (1, 2, 3)}
    for i in range(7):
        others = [j for j in range(7) if j != i]
        similarity = [round(float(rows[i] @ rows[j]), 5) for j in others]
        good = [labels[j] == labels[i] for j in others]
        precision.append(average_precision_score(good, similarity))
        orders = [p for p in permutations(range(6)) if all(similarity[a] >= similarity[b] for a, b in pairwise(p))]
        for k in hits:
            hits[k].append(sum(any(good[j] for j in p[:k]) for p in orders) / len(orders))
    assert result["map"] == pytest.approx(sum(precision) / 7, abs=1e-12)
    assert [result["recall"][str(k)] for k in hits] == pytest.approx([sum(x) / 7 for x in hits.values()], abs=1e-12)


def test_order_parts_and_unknown_labels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(-2, 3, (30, 4), generator=draw).float()
    rows[0] = 0
    labels = torch.randint(-1, 4, (30,), generator=draw)
    whole: Any = retrieval(embeddings(rows, labels.tolist()))
    order = torch.randperm(30, generator=draw)
    monkeypatch.setattr(sys.modules["inbatch.evaluation.retrieval"], "_NUMBERS", 100)
    again: Any = retrieval(embeddings(rows[order], labels[order].tolist()))
    for key in whole.keys() - {"halves"}:  # which image is in which half depends on their order
        assert again[key] == (whole[key] if key == "distance" else pytest.approx(whole[key], abs=1e-12)), key
    assert whole["images"] == int((labels >= 0).sum())
    same: Any = retrieval(embeddings(torch.ones(6, 3), [0, 0, 0, 1, 1, 1]), (1, 9))
    assert same["map"] == pytest.approx(0.4) and same["recall"] == pytest.approx({"1": 0.4, "9": 1.0})


def test_invalid_input_gives_one_sentence() -> None:
    rows = torch.eye(4)
    with pytest.raises(DataError, match="no two images of it have the same class"):
        retrieval(embeddings(rows, [0, 1, 2, -1]))
    with pytest.raises(ConfigError, match="k must be at least 1, not 0"):
        retrieval(embeddings(rows, [0, 0, 1, 1]), (0,))
    bank = embeddings(rows, [0, 0, 1, 1])
    assert evaluate(None, bank, bank, protocols=["retrieval"])["retrieval"]["split"] == "test"


def test_the_user_reads_recall_and_how_many_images_count() -> None:
    """Under the table, which has the mean average precision: an image alone in its class is not a query."""
    rows = torch.eye(5)[:, :4] + 1
    evaluation = {"test": {"labelled": 5}, "retrieval": retrieval(embeddings(rows, [0, 0, 1, 1, 2]), (1, 5))}
    assert any(
        line.startswith("Retrieval:  recall ")
        and line.endswith("% at 5; 4 images as queries; 1 of classes with one image")
        for line in evaluation_lines(evaluation, "held out")
    )
