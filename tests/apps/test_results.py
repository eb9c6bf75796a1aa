"""Pages with figures agree with the result files."""

import functools
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from inbatch.apps.papers import TABLES
from inbatch.apps.papers.filled_table import SURE, fill
from inbatch.apps.papers.render import grid
from inbatch.apps.papers.results import Records, read_records
from inbatch.apps.papers.spec import Table
from inbatch.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]

COMPARED = {name: method for name, method in METHODS.items() if not method.teacher}
"""Methods in the tables: a method that needs a trained teacher has figures of its own on its page."""
WITHOUT_DIGITS: set[str] = set()
"""Methods for which `scripts/measure_methods.py digits` has not run yet; their pages have figures of shorter runs."""


@pytest.fixture
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", ROOT / "scripts" / "render_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_files_make(render: ModuleType) -> None:
    assert (ROOT / "results" / "README.md").read_text() == render.page(), (
        "python scripts/render_results.py writes it again"
    )


@functools.cache
def committed_records() -> Records:
    return read_records(ROOT / "results" / "records")


def test_the_pages_of_tables_are_what_the_records_make() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "scripts" / "render_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    pages = tables.pages(committed_records())
    written = {path.name: path.read_text() for path in tables.DOCS.glob("*.md")}
    assert written == pages, "python scripts/render_tables.py writes them again"


SUMMARIES = [(table, scale) for table in TABLES.values() for scale in table.findings]


@pytest.mark.grid(4)
@pytest.mark.parametrize(("table", "scale"), SUMMARIES, ids=[f"{table.name} {scale}" for table, scale in SUMMARIES])
def test_summary_of_a_table_states_its_figures(table: Table, scale: str) -> None:
    """The paragraph is written by hand and its figures come from the records: both must be updated together."""
    sheet = fill(table, scale, committed_records())
    figures = re.compile(r"\d+\.\d+")
    shown = set(figures.findall(str(grid(sheet)))) | {f"{SURE:g}"}
    assert set(figures.findall(table.findings[scale])) <= shown


@pytest.mark.parametrize("name", ["README", *COMPARED])
def test_the_tables_of_methods_are_what_the_files_make(name: str, render: ModuleType) -> None:
    page = ROOT / "docs" / "methods" / f"{name}.md"
    assert page.read_text() == render.method_page(page), "python scripts/render_results.py writes it again"
    assert page.read_text().count("| untrained encoder |") == (1 if name in WITHOUT_DIGITS else 2)


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "context").glob("*.md")), ids=lambda page: page.stem)
def test_the_tables_of_plug_ins_are_what_the_files_make(page: Path, render: ModuleType) -> None:
    assert page.read_text() == render.plugin_page(page), "python scripts/render_results.py writes it again"


def test_the_table_of_shards_is_what_the_file_makes(render: ModuleType) -> None:
    assert render.DATA.read_text() == render.shards_page(render.DATA), (
        "python scripts/render_results.py writes it again"
    )
    results = render.json.loads((ROOT / "results" / "shards.json").read_text())
    for way in ("sequential", "random"):
        assert results[way]["different_images"] == results[way]["images"] > results["images"] - results["batch"]
        assert results[way]["checked"]


def test_the_tables_of_a_million_images_are_what_the_file_makes(render: ModuleType) -> None:
    assert render.DATA.read_text() == render.million_page(render.DATA), (
        "python scripts/render_results.py writes it again"
    )
    results = render.json.loads((ROOT / "results" / "million.json").read_text())
    assert results["images"] == 1_000_000 and results["path_bytes"]["longest"] > 250
    assert max(results[name]["peak_bytes"] for name in ("scan", "from_cache")) < 300e6
    assert max(results["epoch"]["bytes_per_million_images"]) < 10e6


@pytest.mark.parametrize("kind", ["digits", "cifar"])
def test_plug_ins_are_compared_at_the_same_seeds(kind: str, render: ModuleType) -> None:
    """Each is compared with its baseline: three seeds, and recipes that differ only in the plug-in."""
    questions = render.json.loads((ROOT / "results" / "plugins" / f"{kind}.json").read_text())
    plugs = ("fuse", "curate", "attend", "crops", "shuffle_groups")
    for question in questions.keys() - {"untrained encoder"}:
        for name, entry in questions[question].items():
            other, own = render.baseline(question, name)
            plain = questions[other][own]
            assert [run["seed"] for run in entry["runs"]] == [run["seed"] for run in plain["runs"]] == [0, 1, 2]
            kept = [{k: v for k, v in e["recipe"].items() if k not in plugs} for e in (entry, plain)]
            assert kept[0] == kept[1], name


@pytest.mark.parametrize("kind", ["digits", "cifar"])
def test_every_method_is_in_the_tables(kind: str, render: ModuleType) -> None:
    entries = render.json.loads((ROOT / "results" / "methods" / f"{kind}.json").read_text())
    named = {entry["recipe"]["method"]["name"] for entry in entries.values() if "recipe" in entry}
    assert named == COMPARED.keys() - (WITHOUT_DIGITS if kind == "digits" else set())


def test_every_method_beats_the_untrained_encoder_on_the_digits(render: ModuleType) -> None:
    """By 10 points of k-NN, for every seed."""
    entries = render.json.loads((ROOT / "results" / "methods" / "digits.json").read_text())
    accuracy = {
        name: {run["seed"]: run["evaluation"]["knn"]["top1"] for run in entry["runs"]}
        for name, entry in entries.items()
    }
    untrained = accuracy.pop("untrained encoder")
    assert len(untrained) == 3
    for name, scores in accuracy.items():
        assert all(scores[seed] >= untrained[seed] + 0.1 for seed in untrained), name
