"""The page of the record: its table is that of the entries in results/record."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from inbatch.errors import ConfigError
from inbatch.runtime.files import write_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def record() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record", ROOT / "benchmarks" / "record.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_entries_make(record: ModuleType) -> None:
    assert record.PAGE.read_text() == record.render(), "python benchmarks/record.py render writes it again"


def test_entries_are_ordered_by_their_means(record: ModuleType) -> None:
    def entry(name: str, target: float, knn: float, seconds: float) -> dict[str, Any]:
        seed = {"knn": knn, "seconds": seconds, "cpu_seconds": 2 * seconds, "operations": 93.6e12, "load_before": 0.3}
        where = {"processor": "one", "versions": {"torch": "2"}, "commit": "abc"}
        fields = {"name": name, "target": target, "words": ["simclr", name], "threads": 2, "date": "2026-11-29"}
        return fields | {"seeds": [seed, seed | {"knn": knn + 0.02}], "environment": where}

    lines = record.rows([entry("b", 70, 0.69, 900), entry("c", 75, 0.70, 100), entry("a", 70, 0.71, 300)]).split("\n")
    assert [line.split("`")[1] for line in lines[2:]] == ["simclr a", "simclr b", "simclr c"]
    assert ["not reached" in line for line in lines[2:]] == [False, False, True]
    assert "| 72.00 (71.00, 73.00) | 300 | 600 |" in lines[2] and lines[2].endswith("| 1.0 s |")


def test_a_finished_seed_of_other_words_is_not_taken_for_these(record: ModuleType, tmp_path: Path) -> None:
    write_json(tmp_path / "timed.json", {"knn": 0.7, "asked": {"words": ["simclr"], "data": "d", "threads": 2}})
    assert record.one_seed(Path("d"), ["simclr"], 0, tmp_path, 2) == {"knn": 0.7}
    for data, words, threads in (("d", ["byol"], 2), ("e", ["simclr"], 2), ("d", ["simclr"], 1)):
        with pytest.raises(ConfigError, match="other words, data or threads"):
            record.one_seed(Path(data), words, 0, tmp_path, threads)
