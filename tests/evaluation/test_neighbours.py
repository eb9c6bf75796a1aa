"""Nearest neighbours: exact in any tiles, ties by position, and approximate with exact similarities."""

import sys
from pathlib import Path

import pytest
import torch

from inbatch.errors import ConfigError, DataError
from inbatch.evaluation import exact_search
from inbatch.evaluation.exact_search import unit_rows
from inbatch.evaluation.neighbours import nearest, nearest_others
from inbatch.evaluation.selected_rows import SelectedRows


def brute(query: torch.Tensor, bank: torch.Tensor, k: int, own: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    similarity = (unit_rows(query).double() @ unit_rows(bank).double().T).float()
    if own:
        similarity.fill_diagonal_(-torch.inf)
    near, place = similarity.sort(dim=1, descending=True, stable=True)
    return near[:, :k], place[:, :k]


def with_ties(count: int, width: int) -> torch.Tensor:
    """Return rows of which half are copies of the first ten, in other lengths, and one of zeros."""
    rows = torch.randn(count, width)
    rows[count // 2 :] = 2 * rows[torch.randint(0, 10, (count - count // 2,))]
    rows[3] = 0
    return rows


@pytest.mark.parametrize(("queries", "bank"), [(512, 1 << 15), (57, 64), (300, 33)])
def test_neighbours_are_exact_in_any_tiles_and_ties_are_in_order(
    queries: int, bank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact_search, "_QUERIES", queries)
    monkeypatch.setattr(exact_search, "_BANK", bank)
    for count, width, k in ((40, 3, 1), (200, 20, 5), (200, 4, 30)):
        rows = with_ties(count, width)
        for result, wanted in (
            (nearest_others(rows, k), brute(rows, rows, k, own=True)),
            (nearest(rows[:7], rows, k), brute(rows[:7], rows, k)),
        ):
            assert torch.equal(result[0], wanted[0]) and torch.equal(result[1], wanted[1])
        selection, wanted = torch.arange(0, count, 2), nearest_others(rows[::2], k)
        result = nearest_others(SelectedRows(rows, selection), k)
        assert torch.equal(result[0], wanted[0]) and torch.equal(result[1], wanted[1])


def test_products_of_unit_rows_are_exact_in_any_order_of_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = unit_rows(torch.randn(20, 700) * torch.logspace(-8, 20, 20)[:, None]).double()
    order = torch.randperm(700)
    assert torch.equal(rows @ rows.T, rows[:, order] @ rows[:, order].T)
    assert (rows.norm(dim=1) - 1).abs().max() < 1e-6
    vectors = torch.randn(20, 700)
    wanted = unit_rows(vectors)
    monkeypatch.setattr(exact_search, "_NORMED", 7)
    assert torch.equal(unit_rows(vectors), wanted)


def test_settings_that_cannot_be_used_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(5, 3)
    for k, most in ((0, 4), (5, 4)):
        with pytest.raises(ConfigError, match=f"k = {k} neighbours cannot be taken from {most}"):
            nearest_others(rows, k)
    with pytest.raises(ConfigError, match="unknown index 'hnsw': choose exact or approximate"):
        nearest_others(rows, 1, index="hnsw")
    with pytest.raises(DataError, match="3 and 4 numbers"):
        nearest(rows, torch.randn(5, 4), 1)
    with pytest.raises(DataError, match="NaN or infinity"):
        nearest_others(rows / 0, 1)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install \"inbatch\[index\]\""):
        nearest_others(rows, 1, index="approximate")


@pytest.mark.slow
def test_approximate_neighbours_have_exact_similarities_and_few_are_missed(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    from inbatch.evaluation.neighbour_index import NeighbourIndex, fingerprint

    centres = torch.randn(40, 24)
    rows = centres[torch.arange(4000) % 40] + 0.3 * torch.randn(4000, 24)
    exact, approximate = nearest_others(rows, 10), nearest_others(rows, 10, index="approximate")
    assert (approximate[1][:, :, None] == exact[1][:, None]).any(1).float().mean() > 0.95
    rank = (approximate[1][:, :, None] == exact[1][:, None]).nonzero()
    assert torch.equal(approximate[0][rank[:, 0], rank[:, 1]], exact[0][rank[:, 0], rank[:, 2]])
    index, file, key = NeighbourIndex.build(rows), tmp_path / "index.safetensors", fingerprint(rows)
    selection = torch.arange(0, 4000, 3)
    chosen, copied = (
        NeighbourIndex.build(part).nearest_others(5) for part in (SelectedRows(rows, selection), rows[selection])
    )
    assert torch.equal(chosen[0], copied[0]) and torch.equal(chosen[1], copied[1])
    index.save(file, key)
    loaded = NeighbourIndex.load(file, key, rows)
    assert loaded is not None and torch.equal(loaded.nearest_others(10)[1], approximate[1])
    rows[7, 3] += 1
    assert NeighbourIndex.load(file, fingerprint(rows), rows) is None
    assert NeighbourIndex.load(file, key, rows[:-1]) is None
    file.write_bytes(file.read_bytes()[:-100])
    assert NeighbourIndex.load(file, key, rows) is None and NeighbourIndex.load(tmp_path / "none", key, rows) is None


@pytest.mark.slow
def test_the_index_completes_small_lists_and_identical_rows() -> None:
    pytest.importorskip("faiss")
    for rows in (torch.randn(2, 4), torch.randn(30, 4), torch.ones(300, 4), torch.zeros(20, 4)):
        k = min(len(rows) - 1, 25)
        exact, approximate = nearest_others(rows, k), nearest_others(rows, k, index="approximate")
        assert torch.equal(exact[0], approximate[0])
