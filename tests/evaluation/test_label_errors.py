"""Label errors: flipped labels are found, images that cannot be judged are left out, and samples exclude the image."""

import pytest
import torch
from feature_sets import clouds

from inbatch.errors import ConfigError, DataError
from inbatch.evaluation import Embeddings, label_errors
from inbatch.evaluation.label_errors import cross_validate, judge_labels


def flipped(n: int = 200, errors: int = 15) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return vectors, labels of which some are wrong, and the right labels."""
    features = clouds(n, classes=4, spread=0.6)
    given = features.labels.clone()
    wrong = torch.randperm(n, generator=torch.Generator().manual_seed(1))[:errors]
    given[wrong] = (given[wrong] + 1) % 4
    return features.vectors, given, features.labels


def test_flipped_labels_are_suspected_and_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, given, right = flipped()
    whole = judge_labels(vectors, given)
    wrong = (given != right).nonzero()[:, 0].tolist()
    assert set(whole.judged[whole.suspects].tolist()) == set(wrong) == set(whole.judged[whole.ranking[:15]].tolist())
    assert torch.equal(whole.suggested[whole.suspects], right[whole.judged[whole.suspects]])
    assert 0.9 < whole.agreement < 0.95 and not whole.notes
    assert (whole.probe > -1e-6).all() and (whole.probe.sum(1) < 1 + 1e-6).all()
    assert (whole.votes[whole.suspects, 1] > whole.votes[whole.suspects, 0]).all()
    assert not (whole.neighbours == whole.judged[:, None]).any()
    monkeypatch.setattr(label_errors, "LARGEST", 100)
    monkeypatch.setattr(label_errors, "_TILE", 32)
    sampled = judge_labels(vectors, given)
    assert "by samples: probes on 100 and neighbours among 100" in sampled.notes[0]
    assert not (sampled.neighbours == sampled.judged[:, None]).any() and len(sampled.neighbours.unique()) == 100
    assert set(wrong) >= set(sampled.judged[sampled.suspects].tolist()) and len(sampled.suspects) > 7


def test_a_label_is_judged_by_other_images_only(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, given = torch.arange(60.0)[:, None], torch.arange(60) % 3
    seen: list[int] = []

    class Recorded:
        def __init__(self, train: Embeddings) -> None:
            self.fitted = set(train.vectors[:, 0].int().tolist())
            assert (train.labels.bincount() >= 15).all(), "every class is spread over all folds"

        def scores(self, vectors: torch.Tensor) -> torch.Tensor:
            judged = vectors[:, 0].int().tolist()
            assert not self.fitted & set(judged)
            seen.extend(judged)
            return torch.zeros(len(vectors), 3)

    monkeypatch.setattr(label_errors, "fit", lambda train, classes, probe: Recorded(train))
    cross_validate(rows, given, 3)
    assert sorted(seen) == list(range(60))
    vectors, given, _ = flipped(60)
    monkeypatch.undo()
    before, changed, row = cross_validate(vectors, given, 4), given.clone(), torch.tensor([31])
    changed[row] = (given[row] + 2) % 4
    assert torch.equal(cross_validate(vectors, changed, 4).votes(row, changed, 4), before.votes(row, given, 4))


def test_images_that_cannot_be_judged_are_left_out() -> None:
    vectors, given, right = flipped()
    rare = given.clone()
    rare[given == 3] = 9  # gaps in the numbers of the classes
    rare[:2], rare[2], rare[5:15] = 7, 8, -1
    found = judge_labels(vectors, rare)
    assert sorted({*range(200)} - set(found.judged.tolist())) == [0, 1, 2, *range(5, 15)]
    assert found.notes == (
        "10 images without a label left out",
        "3 images of 2 classes with fewer than 3 images left out: nothing to compare with",
    )
    assert set(found.given.tolist()) == set(found.suggested.tolist()) == {0, 1, 2, 9}
    wrong = (given != right)[found.judged]
    assert wrong[found.suspects].float().mean() > 0.9
    tiny = judge_labels(vectors[:6], torch.tensor([0, 0, 0, 5, 5, 5]))
    assert len(tiny.judged) == 6 and tiny.neighbours.shape == (6, 5)
    same = judge_labels(torch.ones(20, 4), torch.arange(20) % 2)
    assert len(same.judged) == 20 and same.margin.isfinite().all()


def test_what_cannot_be_judged_is_refused() -> None:
    vectors, given, _ = flipped(40)
    for labels, words in (
        (torch.zeros(40, dtype=torch.long), "there are 1 such classes"),
        (torch.full((40,), -1), "there are 0 such classes"),
        (torch.arange(40), "at least two"),
        (given[:, None].expand(-1, 2), "several labels"),
    ):
        with pytest.raises(DataError, match=words):
            judge_labels(vectors, labels)
    with pytest.raises(DataError, match="NaN"):
        judge_labels(vectors * float("nan"), given)
    for options, words in (({"folds": 1}, "folds"), ({"k": 0}, "k must")):
        with pytest.raises(ConfigError, match=words):
            judge_labels(vectors, given, **options)
