"""Selection of images to label: each strategy against its definition, in tiles and with labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from inbatch.errors import ConfigError, DataError
from inbatch.evaluation import selection, typicality
from inbatch.evaluation.selection import STRATEGIES, select


def rows(n: int = 300, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def known(n: int, places: list[int]) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.bool).index_fill(0, torch.tensor(places), True)


def groups(sizes: list[int], width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return narrow clouds around orthogonal centres, and their numbers."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return torch.eye(width)[labels] + 0.05 * rows(len(labels), width), labels


def test_diverse_is_the_farthest_row_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labelled = rows(), known(300, [3, 50, 51])
    unit = F.normalize(x)
    near, expected = (unit @ unit[labelled].T).amax(1), []
    near[labelled] = 2
    for _ in range(40):
        expected.append(int(near.argmin()))
        near = torch.maximum(near, unit @ unit[expected[-1]])
        near[expected[-1]] = 2
    for active, tile in ((1 << 14, 1 << 14), (9, 64), (1, 7)):
        monkeypatch.setattr(selection, "_ACTIVE", active)
        monkeypatch.setattr(selection, "_TILE", tile)
        chosen = select(x, 40, "diverse", labelled=labelled)
        assert chosen.rows.tolist() == expected
        assert (chosen.values[1:] <= chosen.values[:-1] + 1e-6).all()
    assert select(x, 5, "diverse").rows.tolist() != select(x, 5, "diverse", seed=1).rows.tolist()


def test_coverage_is_the_greedy_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labelled = rows(120), known(120, [7, 8])
    unit = F.normalize(x)
    free = (~labelled).nonzero()[:, 0]
    best, expected = (unit[free] @ unit[labelled].T).amax(1), []
    for _ in range(15):
        gains = (unit @ unit[free].T - best).clamp(min=0).mean(1)
        gains[[*expected, 7, 8]] = -1
        expected.append(int(gains.argmax()))
        best = torch.maximum(best, unit[free] @ unit[expected[-1]])
    for batch in (32, 2):
        monkeypatch.setattr(selection, "_BATCH", batch)
        chosen = select(x, 15, "coverage", labelled=labelled)
        assert chosen.rows.tolist() == expected and not chosen.notes
    assert chosen.reasons[-1].endswith(f"to {best.mean():.4f}")
    monkeypatch.setattr(selection, "WITNESSES", 40)
    monkeypatch.setattr(selection, "CANDIDATES", 50)
    sampled = select(x, 15, "coverage", labelled=labelled)
    assert "50 candidates and 40 images" in sampled.notes[0] and len(sampled.rows.unique()) == 15
    first, second = select(x, 2, "coverage").reasons
    assert first.startswith("the image most similar to all others") and second.startswith("raises the mean similarity")


def test_typical_takes_dense_rows_of_clusters_without_labels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    x, group = groups([30, 40, 3, 20])
    monkeypatch.setattr(typicality, "_CLUSTERS", 4)
    labelled = known(len(x), [0])
    chosen = select(x, 7, "typical", labelled=labelled)
    # Clusters without a label first, the largest of them first and the one of three rows last; then those with one.
    assert group[chosen.rows].tolist() == [1, 3, 2, 1, 0, 3, 2]
    unit = F.normalize(x[group == 1])
    similarity = (unit @ unit.T).fill_diagonal_(-1)
    densest = int(similarity.topk(20).values.mean(1).argmax())
    assert int(chosen.rows[0]) == 30 + densest and "cluster" in chosen.reasons[0] and "40 images" in chosen.reasons[0]
    monkeypatch.setattr(typicality, "_FITTED", 50)
    monkeypatch.setattr(typicality, "_OTHERS", 10)
    again = select(x, 92, "typical", labelled=labelled)
    assert again.rows.sort().values.tolist() == list(range(1, 93))


def test_uncertain_takes_rows_between_the_labelled_classes() -> None:
    x, group = groups([40, 40, 20], width=3)
    x[group == 2] = torch.tensor([1.0, 1.0, 0.0]) + 0.01 * rows(20, 3)  # between the first two
    labelled = known(100, [*range(10), *range(40, 50)])
    labels = torch.where(labelled, 2 * group + 1, -1)  # classes 1 and 3 of four: gaps
    chosen = select(x, 20, "uncertain", labelled=labelled, labels=labels, names=["a", "b", "c", "d"])
    assert (group[chosen.rows] == 2).all() and (chosen.values[1:] >= chosen.values[:-1]).all()
    assert {chosen.reasons[0].split()[1], chosen.reasons[0].split()[4]} == {"b", "d"}
    for few in (known(100, [1, 2]), torch.zeros(100, dtype=torch.bool)):
        with pytest.raises(DataError, match="two classes"):
            select(x, 2, "uncertain", labelled=few, labels=labels)
    with pytest.raises(DataError, match="two classes"):
        select(x, 2, "uncertain")


def test_every_strategy_chooses_each_free_row_once(tmp_path: Path) -> None:
    x, labels = rows(60), torch.arange(60) % 3
    stored = np.memmap(tmp_path / "x", np.float32, "w+", shape=(60, 6))
    stored[:] = x.numpy()
    labelled = known(60, [0, 1, 2, 30])
    for strategy in STRATEGIES:
        whole = select(x, 56, strategy, labelled=labelled, labels=labels, seed=5)
        assert sorted([*whole.rows.tolist(), 0, 1, 2, 30]) == list(range(60)) and len(whole.reasons) == 56
        mapped = select(torch.from_numpy(stored), 56, strategy, labelled=labelled, labels=labels, seed=5)
        assert torch.equal(mapped.rows, whole.rows)
        same = select(torch.ones(30, 4), 20, strategy, labelled=labelled[:30], labels=labels[:30])
        assert len(same.rows.unique()) == 20 and not labelled[:30][same.rows].any()
        for count, words in ((57, "at most 56"), (0, "at least 1")):
            with pytest.raises(ConfigError, match=words):
                select(x, count, strategy, labelled=labelled, labels=labels)
        with pytest.raises(DataError, match="NaN"):
            select(x * float("nan"), 2, strategy)
    assert "equal those of another" in select(torch.ones(30, 4), 20, "diverse").notes[0]
    assert select(x[:1], 1, "diverse").rows.tolist() == select(x[:1], 1, "typical").rows.tolist() == [0]
    with pytest.raises(ConfigError, match="unknown strategy 'best'"):
        select(x, 2, "best")
