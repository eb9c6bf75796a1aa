"""Label errors: flipped labels are suspected, images without comparison are left out, samples exclude the image."""

import pytest
import torch
from feature_sets import clouds

from inbatch.errors import ConfigError, DataError
from inbatch.evaluation import Embeddings, label_errors
from inbatch.evaluation.label_errors import check_labels, cross_validate


def flipped(n: int = 200, count: int = 15) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return vectors, labels of which some are wrong, and the right labels."""
    features = clouds(n, classes=4, spread=0.6)
    label = features.labels.clone()
    wrong = torch.randperm(n, generator=torch.Generator().manual_seed(1))[:count]
    label[wrong] = (label[wrong] + 1) % 4
    return features.vectors, label, features.labels


def test_flipped_labels_are_suspected_and_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, label, right = flipped()
    whole = check_labels(vectors, label)
    wrong = (label != right).nonzero()[:, 0].tolist()
    assert set(whole.checked[whole.suspects].tolist()) == set(wrong) == set(whole.checked[whole.ranking[:15]].tolist())
    assert torch.equal(whole.suggested[whole.suspects], right[whole.checked[whole.suspects]])
    assert 0.9 < whole.agreement < 0.95 and not whole.notes
    assert (whole.probe > -1e-6).all() and (whole.probe.sum(1) < 1 + 1e-6).all()
    assert (whole.votes[whole.suspects, 1] > whole.votes[whole.suspects, 0]).all()
    assert not (whole.neighbours == whole.checked[:, None]).any()
    monkeypatch.setattr(label_errors, "LARGEST", 100)
    monkeypatch.setattr(label_errors, "_TILE", 32)
    sampled = check_labels(vectors, label)
    assert "by samples: probes on 100 and neighbours among 100" in sampled.notes[0]
    assert not (sampled.neighbours == sampled.checked[:, None]).any() and len(sampled.neighbours.unique()) == 100
    assert set(wrong) >= set(sampled.checked[sampled.suspects].tolist()) and len(sampled.suspects) > 7


def test_label_is_checked_by_other_images_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, label = torch.arange(60.0)[:, None], torch.arange(60) % 3
    seen: list[int] = []

    class Recorded:
        def __init__(self, train: Embeddings) -> None:
            self.fitted = set(train.vectors[:, 0].int().tolist())
            assert (train.labels.bincount() >= 15).all(), "every class is spread over all folds"

        def scores(self, vectors: torch.Tensor) -> torch.Tensor:
            checked = vectors[:, 0].int().tolist()
            assert not self.fitted & set(checked)
            seen.extend(checked)
            return torch.zeros(len(vectors), 3)

    monkeypatch.setattr(label_errors, "fit", lambda train, classes, probe: Recorded(train))
    cross_validate(rows, label, 3)
    assert sorted(seen) == list(range(60))
    vectors, label, _ = flipped(60)
    monkeypatch.undo()
    before, changed, row = cross_validate(vectors, label, 4), label.clone(), torch.tensor([31])
    changed[row] = (label[row] + 2) % 4
    assert torch.equal(cross_validate(vectors, changed, 4).votes(row, changed, 4), before.votes(row, label, 4))


def test_images_that_cannot_be_checked_are_left_out() -> None:
    vectors, label, right = flipped()
    rare = label.clone()
    rare[label == 3] = 9  # gaps in the numbers of the classes
    rare[:2], rare[2], rare[5:15] = 7, 8, -1
    errors = check_labels(vectors, rare)
    assert sorted({*range(200)} - set(errors.checked.tolist())) == [0, 1, 2, *range(5, 15)]
    assert errors.notes == (
        "10 images without a label left out",
        "3 images of 2 classes with fewer than 3 images left out: nothing to compare with",
    )
    assert set(errors.label.tolist()) == set(errors.suggested.tolist()) == {0, 1, 2, 9}
    wrong = (label != right)[errors.checked]
    assert wrong[errors.suspects].float().mean() > 0.9
    tiny = check_labels(vectors[:6], torch.tensor([0, 0, 0, 5, 5, 5]))
    assert len(tiny.checked) == 6 and tiny.neighbours.shape == (6, 5)
    same = check_labels(torch.ones(20, 4), torch.arange(20) % 2)
    assert len(same.checked) == 20 and same.margin.isfinite().all()


def test_unsuitable_labels_are_refused() -> None:
    vectors, label, _ = flipped(40)
    for labels, words in (
        (torch.zeros(40, dtype=torch.long), "there are 1 of these"),
        (torch.full((40,), -1), "there are 0 of these"),
        (torch.arange(40), "least two are"),
        (label[:, None].expand(-1, 2), "several labels"),
    ):
        with pytest.raises(DataError, match=words):
            check_labels(vectors, labels)
    with pytest.raises(DataError, match="NaN"):
        check_labels(vectors * float("nan"), label)
    for options, words in (({"folds": 1}, "folds"), ({"k": 0}, "k must")):
        with pytest.raises(ConfigError, match=words):
            check_labels(vectors, label, **options)
