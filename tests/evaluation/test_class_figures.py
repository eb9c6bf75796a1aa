"""Figures of a classifier per class, and the calibration of its probabilities."""

import math

import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from inbatch.errors import DataError
from inbatch.evaluation.class_figures import ClassFigures
from inbatch.evaluation.confidence import LEAST, calibrate, calibration_error, fit_temperature


def drawn(n=4000, classes=4, scale=1.0, seed=0):
    """Return logits and labels drawn from softmax(logits); the logits are then multiplied by `scale`."""
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=draw)
    labels = logits.softmax(1).multinomial(1, generator=draw)[:, 0]
    return scale * logits, labels


def test_figures_are_those_of_scikit_learn_and_do_not_depend_on_the_chunks():
    logits, labels = drawn(300, classes=6)
    labels[:7] = -1
    labels[labels == 4] = 5  # never occurs, but is predicted
    whole, parts = ClassFigures("abcdef"), ClassFigures("abcdef")
    whole.add(logits, labels)
    for at in range(0, 300, 70):
        parts.add(logits[at : at + 70], labels[at : at + 70])
    figures = whole.figures(most=3)
    assert parts.figures(most=3) == figures
    known, predicted = labels[7:], logits[7:].argmax(1)
    precision, recall, _, count = precision_recall_fscore_support(
        known, predicted, labels=range(6), zero_division=math.nan
    )
    for i, name in enumerate("abcdef"):
        one = figures["per_class"][name]
        assert one["images"] == count[i] and one["precision"] == pytest.approx(precision[i])
        assert one["recall"] == (pytest.approx(recall[i]) if count[i] else None)
    matrix = torch.from_numpy(confusion_matrix(known, predicted, labels=range(6)))
    assert figures["top1"] == pytest.approx(matrix.diag().sum().item() / 293) and figures["images"] == 293
    assert figures["balanced"] == pytest.approx(recall[count > 0].mean())
    top = matrix.fill_diagonal_(0).flatten().sort(descending=True).values[:3].tolist()
    assert [one["images"] for one in figures["confusions"]] == top
    first = figures["confusions"][0]
    assert first["share"] == top[0] / figures["per_class"][first["class"]]["images"]
    confidence = logits[7:].softmax(1).amax(1)
    assert figures["calibration_error"] == calibration_error(confidence, predicted == known)
    assert figures["top5"] > figures["top1"]


def test_calibration_error_of_known_bins():
    confidence = torch.tensor([0.95, 0.95, 0.55, 0.55])
    correct = torch.tensor([1, 1, 1, 0])
    assert calibration_error(confidence, correct) == pytest.approx((2 * 0.05 + 2 * 0.05) / 4)
    assert calibration_error(torch.ones(5), torch.ones(5)) == 0
    assert calibration_error(torch.ones(5), torch.zeros(5)) == 1
    assert calibration_error(torch.tensor([0.0]), torch.tensor([0])) == 0


def test_temperature_is_recovered_and_lowers_the_error():
    logits, labels = drawn(scale=3)
    assert fit_temperature(logits, labels) == pytest.approx(3, rel=0.05)
    calibration = calibrate(logits, labels)
    assert calibration["temperature"] == fit_temperature(logits, labels) and calibration["images"] == 4000
    assert calibration["before"]["calibration_error"] > 0.15 > 0.03 > calibration["after"]["calibration_error"]
    assert calibration["after"]["cross_entropy"] < calibration["before"]["cross_entropy"]
    grid = [fit_temperature(logits, labels) * (1 + d) for d in (-0.02, 0, 0.02)]
    smoothed = [torch.nn.functional.cross_entropy(logits / t, labels).item() for t in grid]
    assert smoothed[1] == min(smoothed)


def test_figures_after_calibration_use_the_temperature_of_the_other_half():
    logits, labels = drawn(LEAST, classes=2)
    right = logits.argmax(1)
    calibration = calibrate(logits, right)  # all correct: sharper is better, but the temperature stays above 0
    assert 0.02 < calibration["temperature"] < 1
    few = calibrate(logits[: LEAST - 1], labels[: LEAST - 1])
    assert few["temperature"] == 1 and few["after"] is None and few["before"]["calibration_error"] >= 0


def test_no_labelled_image():
    empty = ClassFigures("ab")
    empty.add(torch.zeros(3, 2), torch.tensor([-1, -1, -1]))
    with pytest.raises(DataError, match="no image has a label"):
        empty.figures()
