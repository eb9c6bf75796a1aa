"""Equal similarities and scores, classes without a vote, temperatures, and figures per class."""

import importlib
import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from feature_sets import clouds, encoder, pictures

from inbatch.errors import ConfigError, DataError
from inbatch.evaluation import (
    Embeddings,
    evaluate,
    evaluate_few_labels,
    finetune,
    knn,
    knn_scores,
    linear_probe,
)
from inbatch.evaluation.accuracy import hit_shares, hits

knn_module = importlib.import_module("inbatch.evaluation.knn")


def rows(vectors, labels, classes=()):
    return Embeddings(
        vectors, torch.as_tensor(labels), tuple(map(str, range(len(labels)))), "rows", "f", classes=classes
    )


def duplicates(copies=7, n=12, width=5):
    """Return a bank in which every row occurs `copies` times, each time with another of three classes."""
    once = torch.randn(n, width, generator=torch.Generator().manual_seed(1))
    return rows(once.repeat(copies, 1), torch.arange(n * copies) // n % 3)


def test_classes_without_a_vote_are_misses():
    """Six classes, k = 1, the neighbour of class 0: only queries of class 0 are hits."""
    bank, query = rows(torch.eye(6), range(6)), torch.eye(6)[:1]
    top5 = [knn(bank, rows(query, [truth]), k=1)["top5"] for truth in range(6)]
    assert top5 == [1, 0, 0, 0, 0, 0]
    assert knn_scores(query, bank.vectors, bank.labels, 6, k=1)[0, 1:].eq(-math.inf).all()


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("more", [0, 32])
def test_the_order_of_the_bank_does_not_decide(monkeypatch, distance, more):
    """Duplicates around the k-th place: the same scores for any order of the bank, any chunk and any tile."""
    monkeypatch.setattr(knn_module, "_MORE", more + 1)
    bank, query = duplicates(), torch.randn(6, 5, generator=torch.Generator().manual_seed(2))
    for k in (4, 30):
        options = {"k": k, "distance": distance}
        expected = knn_scores(query, bank.vectors, bank.labels, 3, **options)
        for seed, chunk, tile in ((0, None, 1 << 16), (1, 4, 31)):
            monkeypatch.setattr(knn_module, "_BANK", tile)
            order = torch.randperm(len(bank), generator=torch.Generator().manual_seed(seed))
            scores = knn_scores(query, bank.vectors[order], bank.labels[order], 3, **options, chunk=chunk)
            torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
            truth = rows(query, torch.arange(6) % 3)
            assert knn(bank.take(order), truth, **options) == knn(bank, truth, **options)


def test_neighbours_equal_to_the_kth_share_its_votes():
    """One row is nearest; two votes are left for eight equal rows, six of class 1 and two of class 2."""
    bank = torch.tensor([[1.0, 0.0]] + 8 * [[0.6, 0.8]])
    labels = torch.tensor([0, *6 * [1], 2, 2])
    for distance, unit in (("cosine", lambda s: math.exp(s / 0.1)), ("euclidean", lambda s: 1.0)):
        scores = knn_scores(bank[:1], bank, labels, 4, k=3, distance=distance)
        expected = torch.tensor([[unit(1.0), 1.5 * unit(0.6), 0.5 * unit(0.6), 0.0]], dtype=torch.float64)
        torch.testing.assert_close(scores.exp(), expected, rtol=1e-6, atol=0.0)


def test_equal_features_give_the_shares_of_the_classes():
    """Collapsed features: every row of the bank has the same vote, and the most frequent class is predicted."""
    bank = rows(torch.ones(50, 4), [0] * 10 + [1] * 25 + [2] * 15)
    scores = knn_scores(torch.ones(3, 4), bank.vectors, bank.labels, 3, k=7, temperature=1.0)
    torch.testing.assert_close(scores.softmax(1), torch.tensor([[0.2, 0.5, 0.3]]).double().expand(3, 3))
    assert knn(bank, rows(torch.ones(3, 4), [0, 1, 1]), k=7)["top1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_no_order_of_the_classes_wins_a_tie(distance):
    """Four neighbours at the same distance, two of each class: half a hit for either name of the classes."""
    for names in permutations((0, 1, 2)):
        labels = torch.tensor(names)[torch.tensor([0, 1, 0, 1])]
        result = knn(rows(torch.eye(4), labels), rows(torch.full((1, 4), 0.5), [names[1]]), k=4, distance=distance)
        assert result["top1"] == 0.5 and result["top5"] == 1 and result["ties"] == "shared"


def test_rounding_decides_no_tie():
    """Scores that are equal in mathematics: permuted coordinates give the same similarity and another rounding."""
    draw = torch.Generator().manual_seed(0)
    query = torch.full((1, 301), 0.3)
    for _ in range(5):
        one, other = torch.rand(2, 301, generator=draw)
        pairs = torch.stack([x[torch.randperm(301, generator=draw)] for x in (one, one, other, other)])
        result = knn(rows(pairs, [0, 1, 0, 1]), rows(query, [0]), k=4)
        assert result["top1"] == 0.5


def test_credit_of_equal_scores():
    scores = torch.tensor([[3.0, 3.0, 1.0], [5.0, 2.0, 2.0], [1.0, 1.0, 1.0], [-math.inf, 4.0, 4.0 - 1e-9]])
    assert hit_shares(scores, torch.tensor([1, 1, 2, 0])).tolist() == [0.5, 0, pytest.approx(1 / 3), 0]
    assert hit_shares(scores, torch.tensor([2, 2, 0, 0]), top=2).tolist() == [0, 0.5, pytest.approx(2 / 3), 0]
    near = scores[3:].double() - torch.tensor([0, 0, 1e-9])
    assert hit_shares(near, torch.tensor([2])).tolist() == [0]
    assert hit_shares(near, torch.tensor([2]), equal=1e-8).item() == 0.5


def test_constant_scores_share_their_hits():
    """Constant scores: no class is predicted before another, whatever its number."""
    for truth in range(4):
        assert hits(torch.zeros(5, 4), torch.full((5,), truth))["top1"] == 0.25


@pytest.mark.parametrize("temperature", [0.01, 1e-3, 1e-6, 1e-12])
def test_small_temperatures_do_not_overflow(temperature):
    """As the temperature falls, the nearest neighbour decides, and the classes rank by their nearest neighbours."""
    bank, query = clouds(60, classes=6, seed=1), clouds(30, classes=6, seed=2)
    scores = knn_scores(query.vectors, bank.vectors, bank.labels, 6, k=60, temperature=temperature)
    assert scores.isfinite().all()
    if temperature < 1e-3:
        near = [[knn_nearest(q, bank, c) for c in range(6)] for q in query.vectors]
        assert torch.equal(scores.argsort(1), torch.tensor(near).argsort(1))
        assert knn(bank, query, k=60, temperature=temperature)["top1"] == knn(bank, query, k=1)["top1"]


def knn_nearest(query, bank, c):
    return torch.cosine_similarity(query.double(), bank.vectors[bank.labels == c].double(), dim=1).max().item()


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan, math.inf])
def test_the_temperature_is_above_0(temperature):
    """It is refused before an image is embedded."""
    bank, query = clouds(60, seed=1), clouds(30, seed=2)
    seen, source = [], pictures(9)
    source.image = lambda i: seen.append(i)
    for call in (
        lambda: knn_scores(query.vectors, bank.vectors, bank.labels, 4, temperature=temperature, k=5),
        lambda: knn(bank, query, k=5, temperature=temperature),
        lambda: evaluate_few_labels(bank, query, temperature=temperature),
        lambda: evaluate(encoder(), source, source, temperature=temperature),
        lambda: evaluate(encoder(), source, source, protocols=["corruptions"], temperature=temperature),
    ):
        with pytest.raises(ConfigError, match="temperature of k-NN is"):
            call()
    assert not seen


def test_figures_per_class():
    """A rare class that is never predicted counts as much as a frequent one in the balanced accuracy."""
    bank = rows(torch.tensor([[1.0, 0], [0, 1.0]]), [0, 2], ("cat", "cow", "dog"))
    test = rows(torch.tensor([[1.0, 0.1]] * 4), [0, 0, 0, 2], ("cat", "cow", "dog"))
    evaluation = evaluate(None, bank, test, protocols=["knn", "linear"], k=1)
    for name in ("knn", "linear"):
        assert evaluation[name]["per_class"] == {"cat": 1.0, "dog": 0.0}
        assert evaluation[name]["top1"] == 0.75 and evaluation[name]["balanced"] == 0.5
    assert evaluation["test"]["per_class"] == {"cat": 3, "dog": 1}
    assert set(knn(replace(bank, classes=()), replace(test, classes=()), k=1)["per_class"]) == {"0", "2"}


def test_classes_are_matched_by_name():
    """Test data with some of the classes have other numbers for them."""
    bank = replace(clouds(60, classes=3, seed=1), classes=("a", "b", "c"))
    whole = replace(clouds(30, classes=3, seed=2), classes=("a", "b", "c"))
    part = whole.take((whole.labels > 0).nonzero()[:, 0])
    fewer = replace(part, labels=part.labels - 1, classes=("b", "c"))
    options = {"protocols": ["knn", "linear", "few"], "k": 9, "shares": [0.5], "draws": 1}
    expected, evaluation = evaluate(None, bank, part, **options), evaluate(None, bank, fewer, **options)
    assert evaluation == expected
    assert set(evaluation["knn"]["per_class"]) == {"b", "c"} and evaluation["knn"]["top1"] > 0.5
    unknown = replace(fewer, labels=torch.where(fewer.labels == 1, -1, 0))
    assert knn(bank, unknown, k=9)["per_class"].keys() == {"b"}
    with pytest.raises(DataError, match=r"other classes than clouds: d; pass test data .* \(a, b, c\)"):
        knn(bank, replace(fewer, classes=("b", "d")), k=9)


def test_several_labels_per_image_are_refused_before_embedding():
    train, test = clouds(20, seed=1), clouds(10, seed=2)
    several = replace(test, labels=torch.zeros(10, 3, dtype=torch.long))
    source = pictures(9)
    source.labels = torch.zeros(9, 3, dtype=torch.long)
    seen = []
    source.image = lambda i: seen.append(i)
    for call in (
        lambda: knn(train, several, k=5),
        lambda: linear_probe(several, test),
        lambda: evaluate(None, train, several),
        lambda: evaluate(encoder(), source, source),
        lambda: finetune(encoder(), source, pictures(9)),
    ):
        with pytest.raises(DataError, match=r"shape \(\d+, 3\): .* one class per image .* one column"):
            call()
    assert not seen


def test_nan_scores_are_misses():
    """A classifier that has diverged predicts nothing: not every class."""
    nan = math.nan
    scores = torch.tensor([[nan, nan], [0.0, nan], [nan, 0.0], [1.0, 0.0]])
    assert hit_shares(scores, torch.zeros(4, dtype=torch.long)).tolist() == [0, 0, 0, 1]
    assert hits(scores[:3], torch.tensor([0, 0, 1]))["top1"] == 0


@pytest.mark.parametrize(
    "options", [{"k": 2.0}, {"k": "3"}, {"k": True}, {"k": None}, {"temperature": "0.1"}, {"temperature": None}]
)
def test_settings_of_another_type_are_refused(options):
    bank = rows(torch.eye(6), range(6))
    with pytest.raises(ConfigError, match=r"whole number|temperature of k-NN is"):
        knn(bank, bank, **{"k": 3, **options})


def test_settings_may_be_numpy_numbers():
    bank = rows(torch.eye(6), range(6))
    assert knn(bank, bank, k=np.int64(1), temperature=np.float32(0.1))["top1"] == 1


def test_features_that_cannot_be_compared_are_refused():
    bank = rows(torch.eye(6), range(6))
    with pytest.raises(DataError, match="6 numbers and those of rows 5"):
        knn(bank, rows(torch.eye(5), range(5)), k=3)
    with pytest.raises(ConfigError, match=r"must be Embeddings.*torch\.Tensor"):
        knn(bank.vectors, bank.labels, k=3)
    for labels in (bank.labels - 1, bank.labels + 1, bank.labels[:5]):
        with pytest.raises(DataError, match=r"6 whole numbers from 0 to 5, not torch\.int64 \([56],\) from"):
            knn_scores(bank.vectors, bank.vectors, labels, 6, k=3)


def test_scores_need_vectors_of_one_width_and_whole_labels():
    bank = torch.eye(6)
    with pytest.raises(DataError, match=r"do not have the width of the bank, .*: use features of one encoder"):
        knn_scores(bank[:, :5], bank, torch.arange(6), 6, k=1)
    with pytest.raises(DataError, match=r"6 whole numbers from 0 to 5, not torch\.float32 \(6,\) from 0"):
        knn_scores(bank, bank, torch.arange(6.0), 6, k=1)
