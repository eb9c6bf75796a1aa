"""Tables of the papers: their cells, and how runs are distinguished, stored, found, compared and shown."""

import functools
import html.parser
import json
import re
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import ttest_rel
from typer.testing import CliRunner

from inbatch.apps.cli import app
from inbatch.apps.papers import TABLES, render
from inbatch.apps.papers.command import Selection, run_table_command
from inbatch.apps.papers.curve_plot import curves
from inbatch.apps.papers.effects import effect_notes, effects
from inbatch.apps.papers.expected_time import expected_time
from inbatch.apps.papers.filled_table import fill
from inbatch.apps.papers.results import Record, Records, find_record, read_record, read_records, shipped, write_record
from inbatch.apps.papers.run_records import record_of
from inbatch.apps.papers.runner import Runner
from inbatch.apps.papers.spec import SCALES, Cell, Row, Table, cells, key
from inbatch.apps.papers.table_notes import notes
from inbatch.apps.statistics import difference, paired, seeds_for
from inbatch.errors import ConfigError, DataError, InbatchError, Preempted
from inbatch.runtime.environment import environment
from inbatch.runtime.files import locked, write_json
from inbatch.training.machine import STEP_RULES
from inbatch.training.recipe import make

EVERY = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
TABLE = TABLES["ba-ssl-3"]


def record(cell: Cell, linear: float, **more: Any) -> Record:
    """Return a record as a run of this cell may have written it."""
    where = {"device": "cpu", "processor": "one", "threads": 1, "versions": {"torch": "2"}}
    evaluation = {"linear": {"top1": linear}, "knn": {"top1": linear / 2}}
    curve = [{"step": 0, "epoch": 0, "knn": 0.1}, {"step": 3, "epoch": 1, "knn": linear / 2, "loss": 5.0}]
    fields = {"schema": 1, "status": "finished", "data": cell.data, "source": cell.data, "seed": cell.seed}
    fields |= {"command": cell.command(), "recipe": dict(cell.settings) if cell.counts else cell.recipe().nested()}
    fields |= {"environment": where, "wall_seconds": 3.0, "evaluation": evaluation, "curve": curve} | more
    return Record.model_validate(fields)


def filled(scale: str = "smoke") -> dict[tuple[str, str, int], Record]:
    """Return a record for every run of Table 3; its linear accuracy is computed from row and seed."""
    names = [row.name for row in TABLE.rows]
    records = [record(c, 0.5 + names.index(c.row) / 100 + c.seed * c.seed / 50) for c in cells(TABLE, scale)]
    return {one.run_key: one for one in records}


@EVERY
def test_a_table_is_whole(table: Table) -> None:
    names = [row.name for row in table.rows]
    assert set(table.scales) == set(SCALES) and len(set(names)) == len(names)
    for row in table.rows:
        assert row.against is None or row.against in names
        assert set(row.paper) <= set(table.headings)
        assert set(row.at) <= {*SCALES, *(data for scale in table.scales.values() for data in scale.data)}
    for scale in table.scales.values():
        assert {column.data for column in scale.columns} <= set(scale.data)
        assert all(column.paper is None or column.paper in table.headings for column in scale.columns)
        assert len({column.name for column in scale.columns}) == len(scale.columns)
    if table.headings:
        assert all(row.paper or row.settings is not None for row in table.rows)


@pytest.mark.grid(18)
@EVERY
@pytest.mark.parametrize("scale", SCALES)
def test_every_run_is_a_recipe_and_a_command(table: Table, scale: str) -> None:
    """The command gives the same recipe for every user."""
    from inbatch.apps.cli.app import assignments

    for cell in cells(table, scale, (0,)):
        if cell.counts:
            continue
        recipe = cell.recipe()
        words = shlex.split(cell.command())
        settings = assignments([words[i + 1] for i, word in enumerate(words) if word == "--set"])
        typed = {"method.name": words[2], "data": words[4], "preset": words[6]} | settings
        assert make(typed) == recipe


def test_every_system_of_the_sources_is_reachable() -> None:
    methods = {cell.settings.get("method.name") for table in TABLES.values() for cell in cells(table, "cpu", (0,))}
    named = ("simclr", "moco", "supcon", "swav", "cc", "pcl", "byol", "simsiam", "barlow", "vicreg", "wmse", "nnclr",
             "supervised")  # fmt: skip
    assert methods >= set(named)
    plugs = {name for table in TABLES.values() for row in table.rows for name in (row.settings or {})}
    assert plugs >= {
        "fuse.name",
        "curate.name",
        "attend.name",
        "crops",
        "variance_weight",
        "method.symmetric",
        "method.smooth",
    }


def test_identity_of_a_run_depends_on_its_recipe() -> None:
    recipe = make({"data": "digits-canvas", "method.name": "simclr", "image_size": 32, "preset": "none"})
    same = make(
        {
            "data": "elsewhere",
            "method.name": "simclr",
            "image_size": 32,
            "preset": "none",
            "seed": 3,
            "crops": "default",
        }
    )
    assert key(recipe) == key(same)
    for setting in ({"method.temperature": 0.3}, {"epochs": 7}, {"fuse.name": "conv"}, {"schedule.warmup_epochs": 3.5}):
        assert key(
            make({"data": "digits-canvas", "method.name": "simclr", "image_size": 32, "preset": "none"} | setting)
        ) != key(recipe)
    assert key({"crops": "big", "pairs": 10, "size": 32, "seed": 1}) == key({"crops": "big", "pairs": 10.0, "size": 32})


def test_a_record_is_checked(tmp_path: Path) -> None:
    cell = next(cells(TABLE, "smoke"))
    path = write_record(tmp_path, cell, record(cell, 0.5))
    assert find_record(read_records(tmp_path), cell) == read_record(path)
    whole = json.loads(path.read_text())
    broken = {
        "a number typed by hand": whole | {"accuracy": 0.9},
        "another schema": whole | {"schema": 2},
        "no evaluation": {k: v for k, v in whole.items() if k != "evaluation"},
        "the seed": whole | {"seed": 5},
        "no recipe": whole | {"recipe": {"method": "simclr"}},
        "unknown settings": whole | {"recipe": whole["recipe"] | {"temperatur": 3}},
    }
    for content in broken.values():
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match="is not the result of a run"):
            read_records(tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match="is not the result of a run"):
        read_records(tmp_path)


def test_run_is_reused_for_cells_that_need_no_more_evaluation(tmp_path: Path) -> None:
    cell = next(cells(TABLE, "smoke"))
    write_record(tmp_path, cell, record(cell, 0.5))
    runner = Runner(tmp_path, tmp_path / "work")
    assert runner.missing([cell]) == []
    more = replace(cell, protocols=("few",))
    assert runner.missing([cell, more]) == [more]
    write_record(tmp_path, more, record(more, 0.5, protocols=["few", "corruptions"]))
    assert runner.missing([cell, more]) == []


def test_differences_are_paired_by_seed() -> None:
    sheet = fill(TABLE, "smoke", filled())
    with_, without = sheet.line("SimCLR + BA"), sheet.line("SimCLR")
    a, b = with_.reproduced[0].values, without.reproduced[0].values
    assert with_.reproduced[0].gains == pytest.approx([x - y for x, y in zip(a, b, strict=True)])
    noisy = [0.3, -0.2, 0.9, 1.4]
    assert paired(noisy) == pytest.approx(ttest_rel(noisy, [0.0] * 4).pvalue)
    assert paired([1.0]) is None and paired([0.0, 0.0]) == 1.0
    assert with_.paper_effect("Top1", without) == pytest.approx(0.68)
    missing = {key: r for key, r in filled().items() if key[2] == 0}
    assert fill(TABLE, "smoke", missing).line("BYOL").reproduced[0].seeds == (0,)


def test_a_row_exists_at_its_scales_only() -> None:
    rows = {scale: {row.name for row in TABLE.rows_at(scale)} for scale in SCALES}
    assert rows["laptop"] - rows["cpu"] == {"SimCLR + BA, set", "BYOL + BA, set", "MoCo-v2, symmetric + BA, set"}
    for scale in SCALES:
        assert {cell.row for cell in cells(TABLE, scale, (0,))} == rows[scale]
        assert {line.row.name for line in fill(TABLE, scale, {}).lines} == rows[scale]


def test_effects_state_interval_seeds_and_cost() -> None:
    """The figures of `apps.statistics`, corrected over the rows of a column, and times paired by seed."""
    gains = {"SimCLR + BA": (1.0, 2.0, 3.0), "SimCLR + BA, set": (0.5, -0.5, 0.1)}
    wanted = [c for c in cells(TABLE, "laptop") if c.data == "cifar10" and c.row in ("SimCLR", *gains)]
    records = [
        record(
            cell, (50 + gains.get(cell.row, (0, 0, 0))[cell.seed]) / 100,
            training_cpu_seconds=100.0 * (1 + 0.3 * (cell.row in gains)), training_seconds=1000.0 * (cell.seed + 1),
        )
        for cell in wanted
    ]  # fmt: skip
    sheet = fill(TABLE, "laptop", {one.run_key: one for one in records})
    by_cell = {(one.row, one.column): one for one in effects(sheet)}
    assert {row for row, _ in by_cell} == set(gains)
    one = by_cell["SimCLR + BA", "CIFAR-10, linear"]
    assert one.difference.mean == pytest.approx(2.0) and one.time == pytest.approx(1.3)
    assert one.difference.interval == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-4)
    assert one.holm == pytest.approx(2 * one.difference.p) and one.seeds == seeds_for(2.0, 1.0) == 5
    earlier = [r if r.recipe.get("fuse") else r.model_copy(update={"training_cpu_seconds": None}) for r in records]
    by_wall = {one.row: one.time for one in effects(fill(TABLE, "laptop", {one.run_key: one for one in earlier}))}
    assert by_wall == {"SimCLR + BA": 1.0, "SimCLR + BA, set": 1.0}, "processor time is not compared with wall time"
    assert one.cost == pytest.approx(0.15) and by_cell["SimCLR + BA, set", "CIFAR-10, linear"].seeds > 100
    for text in (render.markdown(sheet), render.page(sheet)):
        assert "Effects" in text and "-0.5 to +4.5" in text
    assert not render.effect_grids(fill(TABLE, "smoke", filled()), 80)
    assert "shown" in " ".join(effect_notes(list(by_cell.values()))).lower()
    faster = replace(one, difference=difference([-1.0, -2.0, -1.5]))
    assert faster.cost is None and replace(one, time=None).cost is None
    assert replace(one, difference=difference([0.01, 0.02, 0.0])).cells(1)[-1] == "", "a gain that is shown as 0"


def test_equal_gains_have_no_p_value_and_need_no_number_of_seeds() -> None:
    """Differences of figures in percent are equal up to rounding, which a t-test would take for certainty."""
    base = {"SimCLR": (0.6, 0.6168, 0.6532), "SimCLR + BA": (0.61, 0.6268, 0.6632)}
    wanted = [c for c in cells(TABLE, "laptop") if c.data == "cifar10" and c.row in base]
    records = [record(cell, base[cell.row][cell.seed]) for cell in wanted]
    for one in effects(fill(TABLE, "laptop", {one.run_key: one for one in records})):
        assert len(set(one.difference.values)) == 1 and one.difference.p is None and one.holm is None
        assert not any("over" in cell for cell in one.cells(1))


def test_the_expected_time_is_that_of_similar_runs() -> None:
    asked = [cell for cell in cells(TABLE, "laptop") if cell.data == "cifar10" and cell.row in ("SimCLR", "BYOL")]
    assert expected_time(asked, [], 2) == ""
    simclr = record(asked[0], 0.5, wall_seconds=600.0)
    other = record(next(cells(TABLE, "smoke")), 0.5, wall_seconds=1.0)
    assert expected_time(asked, [simclr, other], 2).startswith("6 runs, 2 at a time: about 30 minutes")
    tiny = [cell for cell in cells(TABLE, "laptop", (0,)) if cell.data == "tiny" and cell.row == "BYOL"]
    assert "about 10 minutes" in (text := expected_time([asked[0], *tiny], [simclr], 4)) and "; 1 without" in text
    counted = list(cells(TABLES["curation-figure-3"], "cpu"))
    assert expected_time(counted, [simclr], 1) == ""


def test_failed_and_missing_runs_are_shown() -> None:
    asked = list(cells(TABLE, "smoke"))[:2]
    failure = {"exit_code": 4, "sentence": "the loss is nan", "log": "..."}
    ended = record(asked[0], 0.0, status="failed", evaluation=None, failure=failure)
    sheet = fill(TABLE, "smoke", {ended.run_key: ended})
    headings, rows = render.grid(sheet)
    assert rows[0][headings.index("digits, linear")] == "failed" and rows[1][headings.index("digits, linear")] == ""
    assert any("the loss is nan" in note for note in notes(sheet))


def test_a_protocol_that_fails_is_a_gap_and_not_the_run_s_end(tmp_path: Path) -> None:
    """The results of the other protocols are kept; --again evaluates again and does not train again."""
    table = TABLES["ba-ssl-1"]
    asked = [cell for cell in cells(table, "cpu", (0,)) if cell.row == "Ours" and cell.data == "digits"]

    class Diverges(Fake):
        def _call(self, cell: Cell, words: list[str], log: Path) -> dict[str, Any]:
            result = super()._call(cell, words, log)
            return {"exit_code": 4, "error": "the loss is nan"} if words[0] == "evaluate" else result

    runner = Diverges(tmp_path / "results", tmp_path / "work", notify=lambda text: None)
    assert runner.run(asked) == {} and [words[0] for words in runner.asked] == ["pretrain", "evaluate"]
    known = read_records(tmp_path / "results")
    sheet = fill(table, "cpu", known)
    shown = dict(zip([c.name for c in sheet.columns], sheet.line("Ours").reproduced, strict=True))
    assert shown["digits, linear"].text() == "50.0" and shown["digits, linear, 1 % of labels"].text() == "failed"
    assert any("evaluated by few: the loss is nan" in note for note in notes(sheet))
    assert runner.missing(asked) == [] and replace(runner, retry_failed=True).missing(asked) == asked


def test_column_of_inbatch_is_next_to_that_of_the_paper() -> None:
    table = TABLES["ba-ssl-2"]
    headings, rows = render.grid(fill(table, "paper", {}))
    assert headings[:9] == [
        "", "paper: CIFAR-10", "paper: gain", "CIFAR-10, linear", "gain", "paper: CIFAR-100", "paper: gain",
        "CIFAR-100, linear", "gain",
    ]  # fmt: skip
    assert all(len(row) == len(headings) for row in rows)
    headings, _ = render.grid(fill(table, "cpu", {}))
    assert headings.index("digits, linear") == 1 + 2 * len(table.headings)


def test_columns_that_do_not_fit_are_printed_below() -> None:
    headings, rows = ["", "aaaa", "gain", "bbbb", "gain"], [["row", "1", "+1", "2", "+2"]]
    assert render.column_groups(headings, rows, 100) == [[1, 2, 3, 4]]
    assert render.column_groups(headings, rows, 17) == [[1, 2], [3, 4]]  # row___aaaa___gain is 17
    assert render.column_groups(headings, rows, 16) == [[1], [2], [3], [4]]
    assert render.column_groups(headings, rows, 10, together=2) == [[1, 2], [3, 4]]


def test_latex_tables_fit_on_a_page() -> None:
    losing = replace(TABLE, rows=(TABLE.rows[0], replace(TABLE.rows[1], against=TABLE.rows[2].name), *TABLE.rows[2:]))
    text = render.latex(fill(losing, "smoke", filled()))
    assert all(line.count(" & ") <= 8 for line in text.splitlines())
    assert text.count(r"\begin{tabular}") == text.count(r"\toprule") == text.count(r"\bottomrule") > 1
    assert "$-$" in text and not re.search(r"& -\d", text)


class Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.mark.slow
def test_pages_are_self_contained_and_escape_names() -> None:
    evil = "<script>alert(1)</script> | a & b_c $x$ *y*"
    row = Row(evil, TABLE.rows[0].settings, {"Top1": 1.0})
    table = replace(TABLE, rows=(row, *TABLE.rows[1:]), title=evil)
    records = {r.run_key: r for r in (record(c, 0.5) for c in cells(table, "smoke"))}
    sheet = fill(table, "smoke", records)
    page = Page()
    page.feed(render.page(sheet))
    assert "script" not in page.tags and all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert page.loads
    lines = [line for line in render.markdown(sheet).splitlines() if line.startswith("|")]
    bars = {line.replace("\\|", "").count("|") for line in lines}
    assert len(bars) == 1 and not any("<script" in line for line in lines)
    text = render.latex(sheet)
    assert (
        r"\textbackslash" not in text and r"a \& b\_c \$x\$" in text and text.count(r"\begin{") == text.count(r"\end{")
    )


@pytest.mark.slow
def test_curve_covers_the_epochs_that_all_seeds_have() -> None:
    assert curves(fill(TABLE, "smoke", filled())).startswith(b"\x89PNG")
    assert curves(fill(TABLE, "smoke", {})) is None


class Fake(Runner):
    """Write results without training; record the requests."""

    ends: dict[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.asked: list[list[str]] = []
        self.ends = {}

    def _call(self, cell: Cell, words: list[str], log: Path) -> dict[str, Any]:
        self.asked.append(words)
        log.write_text("its last words\n")
        end = self.ends.get(cell.row)
        if isinstance(end, InbatchError):
            raise end
        if end is not None:
            return dict(end)
        where = environment(torch.device("cpu"))
        result = record(cell, 0.5, environment=where).file() | {
            "recipe": cell.recipe().nested() | {"data": "somewhere/else"}
        }
        return {k: v for k, v in result.items() if k not in ("schema", "status", "data", "source", "seed", "protocols")}


def test_existing_results_are_not_computed_again(tmp_path: Path) -> None:
    messages: list[str] = []
    asked = list(cells(TABLE, "smoke", (0,)))
    runner = Fake(tmp_path / "results", tmp_path / "work", notify=messages.append)
    runner.ends = {"BYOL": InbatchError("it crashed"), "SimCLR": {"exit_code": 4, "error": "the loss is nan"}}
    assert {name.split("-")[0] for name in runner.run(asked)} == {"byol"}
    assert len(runner.asked) == len(asked) and len(messages) == len(asked)
    known = read_records(tmp_path / "results")
    assert len(known) == len(asked) - 1 and sum(r.status == "failed" for r in known.values()) == 1
    assert all(r.recipe["data"] == "digits-canvas-colour" for r in known.values())
    again = Fake(tmp_path / "results", tmp_path / "work", notify=messages.append)
    assert again.run(asked) == {} and len(again.asked) == 1  # a crash is repeated, divergence is not
    retried = Fake(tmp_path / "results", tmp_path / "work", retry_failed=True, notify=messages.append)
    retried.run(asked)
    assert len(retried.asked) == 1 and all(r.status == "finished" for r in read_records(tmp_path / "results").values())


def test_a_run_is_compared_with_the_repetition_on_its_kind_of_processor(tmp_path: Path) -> None:
    """A folder may hold repetitions of a run: gain and time are from the pair that was computed alike."""
    asked = [cell for cell in cells(TABLE, "laptop", (0,)) if cell.row in ("SimCLR", "SimCLR + BA")]
    environment = record(asked[0], 0.5).environment
    alike, older = ({"environment": environment | {"instructions": name}, "precision": "float32"} for name in "BA")
    write_record(tmp_path, asked[0], record(asked[0], 0.5, training_cpu_seconds=8.0, **older))
    write_record(tmp_path, asked[1], record(asked[1], 0.53, training_cpu_seconds=6.0, **alike))
    first = fill(TABLE, "laptop", read_records(tmp_path))
    assert first.mixed_pairs == 1 and not first.repetitions and {effect.time for effect in effects(first)} == {None}
    for name, top1 in (("b", 0.51), ("a", 0.9)):
        path = write_record(tmp_path / name, asked[0], record(asked[0], top1, training_cpu_seconds=4.0, **alike))
        path.rename(tmp_path / f"{path.stem}-{name}.json")
    (tmp_path / f"{path.stem}-a.json").write_text((tmp_path / f"{path.stem}-a.json").read_text().replace('"B"', '"C"'))
    sheet = fill(TABLE, "laptop", read_records(tmp_path))
    linear = [line.reproduced[0] for line in sheet.lines if line.records]
    assert [value.values for value in linear] == [(50.0,), (53.0,)] and linear[1].gains == (2.0,)
    assert sheet.mixed_pairs == 0 and [one.computation for one in sheet.repetitions] == [("float32", "B")]
    assert {effect.time for effect in effects(sheet)} == {1.5}
    text = " ".join(notes(sheet))
    assert "1 gain against repetitions" in text and all(f", {name}, float32)" in text for name in "AB")
    assert ", C, " not in text and "2 of " in text


def test_runs_with_a_mended_fault_are_counted(tmp_path: Path) -> None:
    """Fusion by convolutions had wrong gradients; a run of now states the rules of its step."""
    (cell,) = (cell for cell in cells(TABLE, "laptop", (0,)) if cell.row == "SimCLR + BA" and cell.data == "cifar10")
    old = record(cell, 0.5)
    now = record(cell, 0.5, environment=old.environment | {"step rules": STEP_RULES})
    others = [record(cell, 0.5) for cell in cells(TABLE, "laptop", (0,)) if cell.row in ("SimCLR", "SimCLR + BA, set")]
    assert [old.outdated, now.outdated, *(one.outdated for one in others)] == [True, *[False] * (1 + len(others))]
    for one, count in ((old, 1), (now, 0)):
        text = " ".join(notes(fill(TABLE, "laptop", {one.run_key: one})))
        assert ("1 run with fusion by convolutions had wrong gradients" in text) == bool(count)


def test_the_precision_of_runs_can_be_chosen(tmp_path: Path) -> None:
    """A table states its precision, which depends on the machine otherwise; a result in another one is missing."""
    asked = [cell for cell in cells(TABLE, "smoke", (0,)) if cell.row in ("SimCLR", "SimCLR + BA")]
    runner = Fake(tmp_path / "results", tmp_path / "work", precision="bf16", notify=lambda text: None)
    for cell, precision in zip(asked, ("bfloat16", "float32"), strict=True):
        write_record(runner.results, cell, record(cell, 0.5, precision=precision))
    sheet = fill(TABLE, "smoke", read_records(runner.results))
    assert sheet.mixed_pairs == 1 and "1 gain between runs of different precision or" in " ".join(notes(sheet))
    assert all(f", {name})" in " ".join(notes(sheet)) for name in ("bfloat16", "float32"))
    for instructions, count in (("AVX2", 0), ("AVX512", 1)):
        machine = {"environment": record(asked[0], 0.5).environment | {"instructions": instructions}}
        older = {"environment": machine["environment"] | {"instructions": "AVX2"}}
        pair = [record(c, 0.5, precision="float32", **one) for c, one in zip(asked, (older, machine), strict=True)]
        other = fill(TABLE, "smoke", {one.run_key: one for one in pair})
        assert other.mixed_pairs == count and f"{instructions}, float32)" in " ".join(notes(other))
    assert runner.missing(asked) == asked[1:] and replace(runner, precision="auto").missing(asked) == []
    assert all(" --precision bf16 " in line for line in runner.launch(asked))
    runner.run(asked)
    config = json.loads((runner.work / f"{asked[1].stem}.json").read_text())
    assert config["precision"] == "bf16" and len(runner.asked) == 1
    result = record(asked[1], 0.5).file() | {"precision": "bfloat16"}
    made = record_of(asked[1], "images", result | {"recipe": result["recipe"] | {"precision": "bf16"}})
    assert made.run_key == record(asked[1], 0.5).run_key and made.precision == "bfloat16"
    (runner.work / asked[1].stem).mkdir()
    write_json(runner.work / asked[1].stem / "result.json", result | {"precision": "float32"})
    with pytest.raises(ConfigError, match="is of precision float32: choose another --work-dir"):
        runner._run_cell(asked[1])


def test_a_second_table_in_the_same_folder_waits_for_the_first(tmp_path: Path) -> None:
    runner = Fake(tmp_path / "results", tmp_path / "work", notify=lambda text: None)
    with locked(tmp_path / "work"), pytest.raises(ConfigError, match="is being written by process"):
        runner.run(list(cells(TABLE, "smoke", (0,))))
    assert runner.asked == [] and not list((tmp_path / "results").glob("*.json"))


@pytest.mark.slow
def test_how_far_a_table_is(tmp_path: Path) -> None:
    """The progress bar moves with every finished run and with the progress of the running ones."""
    shown: list[tuple[float, int, str, str]] = []
    asked = list(cells(TABLE, "smoke", (0,)))

    class Slow(Fake):
        def _call(self, cell: Cell, words: list[str], log: Path) -> dict[str, Any]:
            self._children[cell.stem] = None  # type: ignore[assignment]
            time.sleep(1.2 if self.asked == [] else 0)
            result = super()._call(cell, words, log)
            del self._children[cell.stem]
            return result

    work = tmp_path / "work"
    folder = work / asked[0].stem
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"steps": 10}')
    (folder / "metrics.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    Slow(tmp_path / "results", work, jobs=1, notify=lambda text: None, show=lambda *how: shown.append(how)).run(asked)
    assert shown[0][:3] == (0.5, len(asked), f"0 of {len(asked)} runs") and "left" in shown[0][3]


def test_missing_data_set_is_reported_once(tmp_path: Path) -> None:
    runner = Fake(tmp_path / "results", tmp_path / "work", notify=lambda text: None)
    table = TABLES["ba-ssl-4"]
    problems = runner.run(list(cells(table, "gpu", (0,))))
    messages = {str(problem) for problem in problems.values()}
    assert messages == {"the images of tiny-imagenet-100 have no default path: pass --data tiny-imagenet-100=PATH"}
    assert all(problem.exit_code == 3 for problem in problems.values())


def test_runs_made_elsewhere_are_collected(tmp_path: Path) -> None:
    """A run that torchrun or SLURM made in the runner's folders becomes a result."""
    table = TABLES["ba-ssl-4"]
    runner = Runner(tmp_path / "results", tmp_path / "work", places={"imagenet": "/data/imagenet"})
    asked = list(cells(table, "paper"))
    launch = list(runner.launch(asked))
    assert len(launch) == 4 and all(" --data /data/imagenet " in line and "--resume auto" in line for line in launch)
    folder = tmp_path / "work" / asked[0].stem
    folder.mkdir(parents=True)
    result = record(asked[0], 0.5, environment=environment(torch.device("cpu"))).file()
    (folder / "result.json").write_text(json.dumps(result | {"recipe": result["recipe"] | {"data": "/data/imagenet"}}))
    runner.collect(asked)
    assert (
        find_record(read_records(tmp_path / "results"), asked[0]) is not None and len(list(runner.launch(asked))) == 3
    )


@pytest.fixture
def run_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)
    yield lambda *words: CliRunner().invoke(app, ["table", *words])


def test_the_list_of_tables(run_cli: Any) -> None:
    result = run_cli()
    assert result.exit_code == 0 and all(name in result.stdout for name in TABLES)
    assert [t["name"] for t in json.loads(run_cli("--json").stdout)["tables"]] == list(TABLES)


@pytest.mark.grid(2)
@EVERY
def test_a_table_is_shown_without_running_anything(table: Table, run_cli: Any, tmp_path: Path) -> None:
    result = run_cli(table.name)
    assert result.exit_code == 0, result.output
    assert table.rows[0].name in result.stdout and "inbatch " in result.stdout
    assert list(tmp_path.iterdir()) == []
    shown = json.loads(run_cli(table.name, "--json").stdout)
    rows = [row for row in table.rows if not row.scales or shown["scale"] in row.scales]
    assert shown["name"] == table.name and len(shown["rows"]) == len(rows)


@pytest.mark.grid(2)
@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["ba-ssl-33"], 2, "ba-ssl-3"),
        (["ba-ssl-3", "--scale", "cpuu"], 2, "cpu"),
        (["ba-ssl-3", "--row", "SimCLR+BA"], 2, "SimCLR + BA"),
        (["ba-ssl-3", "--on", "cifar"], 2, "photos"),
        (["ba-ssl-3", "--data", "cifar10"], 2, "NAME=PATH"),
        (["ba-ssl-3", "--scale", "cpu", "--data", "photos=."], 2, "no run of ba-ssl-3 reads photos: choose cifar10"),
        (["ba-ssl-3", "--from", "nowhere"], 2, "is not a folder of results: pass the folder `results`"),
        (["ba-ssl-3", "--from", "."], 2, "contains no records of runs (*.json): pass the folder `results`"),
        (["ba-ssl-3", "-o", "table.doc"], 2, ".md"),
        (
            ["ba-ssl-3", "--scale", "gpu", "--on", "tiny", "--seed", "0", "--row", "BYOL"],
            3,
            "--data tiny-imagenet-100=PATH",
        ),
    ],
)
def test_invalid_requests_are_refused(words: list[str], code: int, says: str, run_cli: Any) -> None:
    result = run_cli(*words)
    assert result.exit_code == code and says in result.output and "Traceback" not in result.output
    report = json.loads(run_cli(*words, "--json", "--quiet").stdout)
    assert report["exit_code"] == code and says in report["error"]


def test_images_of_the_current_folder(run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`.` was removed from every number of the result."""
    known = list(cells(TABLE, "smoke", (0,)))

    def call(self: Runner, cell: Cell, words: list[str], log: Path) -> dict[str, Any]:
        file = Path(words[words.index("--config") + 1])
        recipe = json.loads(file.read_text())
        assert recipe["data"] == str(tmp_path)
        result = record(known[0], 0.5, environment=environment(torch.device("cpu"))).file()
        return result | {"recipe": recipe, "curve": [{"epoch": 1, "step": 1, "knn": 0.125}]}

    monkeypatch.setattr(Runner, "_call", call)
    words = ["ba-ssl-3", "--scale", "smoke", "--row", "SimCLR", "--seed", "0", "--data", "digits-canvas-colour=."]
    result = run_cli(*words, "--jobs", "1")
    assert result.exit_code == 0, result.output
    [one] = read_records(tmp_path / "runs" / "table" / "results").values()
    assert one.source == tmp_path.name and one.curve[0]["knn"] == 0.125


@pytest.mark.grid(1)
@pytest.mark.parametrize("ending", render.FORMATS)
def test_a_table_is_written(ending: str, run_cli: Any, tmp_path: Path) -> None:
    for cell in cells(TABLE, "smoke"):
        write_record(tmp_path / "mine", cell, record(cell, 0.5))
    result = run_cli("ba-ssl-3", "--scale", "smoke", "--from", "mine", "-o", f"out/table{ending}")
    assert result.exit_code == 0, result.output
    assert "SimSiam + BA" in (tmp_path / "out" / f"table{ending}").read_text()


@pytest.mark.slow
def test_one_cell_is_run_and_not_run_again(run_cli: Any, tmp_path: Path) -> None:
    """The complete path, with a real run of one second."""
    words = ["ba-ssl-3", "--scale", "smoke", "--row", "SimCLR", "--seed", "0", "--jobs", "1", "--device", "cpu"]
    result = run_cli(*words)
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "runs" / "table" / "results").glob("*.json")
    one = read_record(path)
    assert one.run_key in read_records(path.parent) and one.curve[-1]["loss"] > 0
    assert not (tmp_path / "runs" / "table" / path.stem / "checkpoints").exists()
    before = path.stat().st_mtime_ns
    assert run_cli(*words).exit_code == 0 and path.stat().st_mtime_ns == before


@pytest.mark.slow
def test_table_stopped_by_a_signal_can_be_continued(tmp_path: Path) -> None:
    """SIGTERM: the running runs save a checkpoint, no result is partial, and the same command completes them."""
    base = TABLE.rows[2]
    table = replace(TABLE, rows=(replace(base, settings={**(base.settings or {}), "epochs": 12}),))
    asked = list(cells(table, "smoke", (0,)))
    runner = Runner(tmp_path / "results", tmp_path / "work", jobs=1, device="cpu", notify=lambda text: None)

    def stop() -> None:
        log = tmp_path / "work" / asked[0].stem / "metrics.jsonl"
        while not log.exists() or len(log.read_text().splitlines()) < 4:
            time.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Preempted, match="run the same command to continue"):
        runner.run(asked)
    assert not list((tmp_path / "results").glob("*"))
    assert (tmp_path / "work" / asked[0].stem / "checkpoints" / "last.pt").exists()
    again = Runner(tmp_path / "results", tmp_path / "work", jobs=1, device="cpu", notify=lambda text: None)
    assert again.run(asked) == {} and len(read_records(tmp_path / "results")) == 1


@pytest.mark.slow
@pytest.mark.timeout(2400)
@EVERY
def test_every_table_runs_at_smoke_scale(table: Table, tmp_path: Path) -> None:
    """Every row, with one seed."""
    runner = Runner(tmp_path / "results", tmp_path / "work", device="cpu", notify=lambda text: None)
    asked = run_table_command(TABLES, table.name, "smoke", runner=runner, selection=Selection(seeds=[0]))
    assert not asked.problems
    assert all(
        value.values for line in asked.filled.lines if line.row.settings is not None for value in line.reproduced
    )


@functools.cache
def shipped_records() -> Records:
    return read_records(shipped())


def test_shipped_results_belong_to_the_tables() -> None:
    """Every committed file is a record, and belongs to the run of a cell of some table."""
    known = [read_record(path) for path in shipped().glob("*.json")]
    asked = {(c.key, c.data, c.seed) for table in TABLES.values() for scale in SCALES for c in cells(table, scale)}
    assert {one.run_key for one in known} <= asked
    for one in known:
        assert "/" not in one.source.removeprefix("torchvision/") and '"/' not in json.dumps(one.file())
        assert not re.search(r"\s/\w+/", json.dumps(one.file())), "the way to somebody's folder"


def test_shipped_results_are_named_as_such() -> None:
    """Pages link to the records by file name; a repetition of a run adds the instructions of its processor."""
    stems = {(c.key, c.data, c.seed): c.stem for table in TABLES.values() for s in SCALES for c in cells(table, s)}
    for path in shipped().glob("*.json"):
        one = read_record(path)
        stem = stems[one.run_key]
        assert path.stem in (stem, f"{stem}-{(one.computation[1] or '').lower()}"), path
        assert (shipped() / f"{stem}.json").exists()


def test_images_that_one_run_lacks_are_not_lacking_to_others(tmp_path: Path) -> None:
    """A run that ends because of its data is reported by itself: the next may need no labels, or other images."""
    runner = Fake(tmp_path / "results", tmp_path / "work", notify=lambda text: None)
    runner.ends = {"MoCo-v2": DataError("no labels")}
    asked = list(cells(TABLE, "smoke", (0,)))
    assert len(runner.run(asked)) == 1 and len(read_records(tmp_path / "results")) == len(asked) - 1


def test_reduced_table_needs_fewer_runs() -> None:
    result = run_table_command(
        TABLES, TABLE.name, "cpu", runner=None, from_=shipped(), selection=Selection(["SimCLR + BA"], ["digits"], [0])
    )
    assert result.filled.total_runs == 2


def test_figure_3_is_the_papers() -> None:
    """Shares agree within 0.15 points, for every seed."""
    table = TABLES["curation-figure-3"]
    (line,) = fill(table, "cpu", shipped_records()).lines
    for paper, value in zip(line.paper, line.reproduced, strict=True):
        assert len(value.values) == 3 and all(abs(one - paper) < 0.15 for one in value.values)


def test_unknown_settings_of_a_table_are_errors() -> None:
    row = Row("typo", {"method.name": "simclr", "method.temprature": 1})
    with pytest.raises(ConfigError, match="temperature"):
        next(cells(replace(TABLE, rows=(row,)), "smoke")).recipe()
