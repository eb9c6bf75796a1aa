"""Own comparisons: variants, plans, tests of differences, sentences, files, and the script for SLURM."""

import csv
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import own_code
import pytest
import torch
from command_line import one_object, run
from PIL import Image

import inbatch
from inbatch.apps import statistics as st
from inbatch.apps.comparisons.choice import best_of
from inbatch.apps.comparisons.compare import _command
from inbatch.apps.comparisons.metrics import METRICS
from inbatch.apps.comparisons.plan import _unequal_conditions
from inbatch.apps.comparisons.report import _comparison, _notes
from inbatch.apps.comparisons.request import KEPT, Request, resolved
from inbatch.apps.comparisons.timing import Shares, _final_share, budget_sentence, run_share
from inbatch.apps.comparisons.variants import parse_grid, variants_of
from inbatch.apps.comparisons.variation import Variation
from inbatch.apps.papers.results import Record, read_records
from inbatch.apps.papers.runner import Runner
from inbatch.apps.papers.spec import Cell
from inbatch.data import open_data
from inbatch.errors import ConfigError, DataError, InbatchError
from inbatch.evaluation import evaluate
from inbatch.evaluation.accuracy import halves, hits
from inbatch.evaluation.finetune import TUNINGS
from inbatch.models import create_encoder
from inbatch.runtime import tuning
from inbatch.runtime.environment import environment
from inbatch.runtime.source_hash import source_hash
from inbatch.training.budget import parse_budget

FAST = ["--data", "digits-canvas", "--set", "subset=64", "--epochs", "1"]
SIMCLR, BYOL = "pretrain simclr", "pretrain byol"


def test_paired_test_and_interval_are_those_of_the_textbook() -> None:
    """Differences 1, 2, 3, 6: mean 3, deviation sqrt(14/3), t = 3 / (deviation / 2) = 2.777, 3 degrees of freedom."""
    one = st.difference([1.0, 2.0, 3.0, 6.0])
    assert one.mean == 3 and one.deviation == pytest.approx(math.sqrt(14 / 3))
    assert one.interval == pytest.approx((3 - 3.182446 * math.sqrt(14 / 3) / 2, 3 + 3.182446 * math.sqrt(14 / 3) / 2))
    x = 3 / (math.sqrt(14 / 3) / 2) / math.sqrt(3)  # closed form of t with 3 degrees of freedom
    assert one.p == pytest.approx(1 - 2 / math.pi * (x / (1 + x * x) + math.atan(x)))
    assert st.difference([1.0]).p is None and st.difference([]).mean is None
    assert st.difference([0.5, 0.5]).p is None  # no spread is no certainty


def test_sign_flips_are_counted() -> None:
    assert st.sign_flip([1.0, 2.0, 3.0]) == 2 / 8 == st.smallest_sign_p(3)
    assert st.sign_flip([1.0, 2.0, -3.0]) == 1.0
    assert st.sign_flip([5.0, 1.0, -1.0]) == 6 / 8  # 5, 5+2, 5-2 and their negatives are as far as 5; |5-2| is not
    assert st.sign_flip([0.0, 0.0]) == 1.0 and st.sign_flip([1.0]) is None
    assert [st.smallest_sign_p(n) for n in (2, 5, 6)] == [0.5, 0.0625, 0.03125]
    assert st.sign_flip([0.1 * i for i in range(1, 21)]) == pytest.approx(1 / 100_001)  # a sample of 2 ** 20 patterns


def test_holm_keeps_the_order() -> None:
    assert st.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert st.holm([0.5, 0.9]) == [1.0, 1.0] and st.holm([]) == [] and st.holm([0.2]) == [0.2]


def test_numbers_of_seeds_are_those_of_power_tables() -> None:
    """Cohen's tables and G*Power: 34 pairs for d = 0.5, 15 for 0.8, 10 for 1, at 5 % and 80 %."""
    assert [st.seeds_for(d, 1.0) for d in (0.5, 0.8, 1.0)] == [34, 15, 10]
    assert st.seeds_for(1.0, 2.0) == 34 and st.seeds_for(-0.5, 1.0) == 34
    assert st.seeds_for(0.5, 1.0, level=0.025) > 34
    assert st.seeds_for(1.0, 0.0) == 2 and st.seeds_for(0.0, 1.0) is None and st.seeds_for(1e-3, 1.0) is None
    assert st.power_of(0.0, 1.0, 5) == pytest.approx(0.05) and st.power_of(1000.0, 1.0, 5) == 1.0
    for seeds in (2, 3, 10):
        assert st.power_of(st.detectable(2.0, seeds), 2.0, seeds) == pytest.approx(st.POWER, abs=1e-4)
    # Two seeds and many comparisons: T is above the limit if |N(0, 1)| is below shift / limit, which is 1.2816 at 80 %.
    limit = math.tan(math.pi / 2 * (1 - st.LEVEL / 50))
    assert st.detectable(1.0, 2, st.LEVEL / 50) == pytest.approx(1.2816 * limit / math.sqrt(2), rel=1e-3)
    assert st.largest_deviation(1.0, 3) == pytest.approx(math.sqrt(2 / 0.446287), rel=1e-5)  # -2 ln 0.8


def test_a_variant_is_parsed_by_the_real_command() -> None:
    [one, two] = variants_of(["inbatch pretrain simclr --fuse conv --lr 0.1", "pretrain --set method.temperature=0.2"])
    assert one.name == "simclr --fuse conv --lr 0.1"
    assert one.settings == {"method.name": "simclr", "fuse.name": "conv", "optimizer.lr": 0.1}
    assert two.settings == {"method.temperature": 0.2}


@pytest.mark.grid(6)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("simclr", 'such as "pretrain simclr"'),
        ("pretrain 'simclr", "No closing quotation"),
        ("pretrain simclr --bach 3", "No such option: --bach"),
        ("pretrain simclr --weight-decay 3", "use --set optimizer.weight_decay="),
        ("pretrain simclr --epochs x", "Invalid value for '--epochs'"),
        ("pretrain simclr --data photos", "use --data of the comparison"),
        ("pretrain simclr --seed 1", "use --seeds of the comparison"),
        ("pretrain simclr --quiet", "--quiet is not part of a variant"),
        ("pretrain simclr --set seed=1", "which all variants share: use --seeds"),
        ("pretrain simclr --set knn_k=5", "use --set knn_k=VALUE"),
        ("pretrain simclr --set x", "takes key=value"),
        ("pretrain simclr --help", "No such option"),
        ("pretrain simclr --config nowhere.yaml", "cannot read the recipe"),
    ],
)
def test_a_wrong_variant_is_named(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match="variant ") as error:
        variants_of([SIMCLR, text])
    assert says in str(error.value) and repr(text) in str(error.value)


def test_a_file_of_settings_keeps_only_what_a_variant_may_set(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    file.write_text('{"data": "elsewhere", "seed": 7, "knn_k": 3, "method": {"name": "moco"}, "epochs": 3}')
    [one, _] = variants_of([f"pretrain --config {file} --epochs 5", SIMCLR])
    assert one.settings == {"method.name": "moco", "epochs": 5}


def test_a_grid_is_applied_to_every_variant() -> None:
    grid = parse_grid(["method.temperature=0.1,0.2", "views.scale=[0.2,1],[0.5,1]"])
    assert grid == {"method.temperature": [0.1, 0.2], "views.scale": [[0.2, 1], [0.5, 1]]}
    rows = variants_of([SIMCLR, "pretrain moco"], grid)
    assert len(rows) == 8 and rows[1].name == "simclr method.temperature=0.1 views.scale=[0.5, 1]"
    assert rows[7].settings == {"method.name": "moco", "method.temperature": 0.2, "views.scale": [0.5, 1]}
    for text in ("x", "=1", "a=", "a=1,1"):
        with pytest.raises(ConfigError, match="--grid"):
            parse_grid([text])
    for texts, values in (([SIMCLR], {}), ([], {}), ([SIMCLR], {"seed": [1, 2]}), ([SIMCLR], {"lr": list(range(201))})):
        with pytest.raises(ConfigError):
            variants_of(texts, values)


def test_a_budget_is_divided_over_rounds_of_runs() -> None:
    assert run_share(7200, 6, 1) == (1 - KEPT) * 1200 and run_share(7200, 6, 4) == (1 - KEPT) * 3600
    with pytest.raises(ConfigError, match=r"6 runs, 1 at a time, leaves 45 s for a run.*give at least 7 min"):
        run_share(300, 6, 1)


def test_variants_of_equal_steps_have_the_same_length() -> None:
    variants = variants_of([SIMCLR, BYOL])
    request = Request(tuple(variants), "digits-canvas", (0,), {"steps": 4, "batch_size": 16, "image_size": 32})
    recipes = resolved(request)[1]
    recipes[1] = replace(recipes[1], epochs=recipes[0].epochs + 1)
    assert not any("differ in" in note for note in _unequal_conditions(request, recipes, None))
    longer = [recipes[0], replace(recipes[1], steps=5)]
    assert "The variants differ in steps, which may explain a difference." in _unequal_conditions(request, longer, None)


def test_mistakes_in_python() -> None:
    for options, message in (
        ({"jobs": 0}, "jobs must be at least 1"), ({"detect": "1"}, "detect = '1': give a difference"),
        ({"grid": ["method.temperature=0.1,0.2"]}, "grid is a dict of lists"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            inbatch.compare([SIMCLR, BYOL], "digits-canvas", epochs=1, run=False, **options)  # type: ignore[arg-type]


def test_the_command_of_a_long_budget_can_be_typed() -> None:
    request = Request((), "photos", (0,), budget=parse_budget("15d"))
    words = _command([SIMCLR], request, Path("own"), None, None, (False, None, None))
    assert parse_budget(words[words.index("--budget") + 1]) == 15 * 86400


def test_the_share_of_a_run_leaves_time_for_planning_start_and_evaluation() -> None:
    """20 minutes, 3 of them for planning, 4 runs in pairs that take 40 s besides their share."""
    share = _final_share(1200.0, 180.0, 4, 2, 40.0)
    assert 180 + 2 * (share + 40.0) == pytest.approx(1200 - 0.04 * 1020)
    with pytest.raises(ConfigError, match=r"planning took 3 min, and each of 4 runs, 2 at a time, needs 60 s and 40 s"):
        _final_share(360.0, 180.0, 4, 2, 40.0)
    text = budget_sentence(Shares((), share, 40.0), 4, 2, 1020.0)
    assert "about 16 min from now, 7 min for each run and at most 40 s to start and evaluate it" in text
    assert text.endswith("17 min of the budget are left.")


FAILED = Record.model_validate(
    {"schema": 1, "status": "failed", "data": "digits", "source": "digits", "seed": 0, "command": "", "wall_seconds": 1}
    | {"recipe": {"seed": 0}, "failure": {"exit_code": 4, "sentence": "the loss is nan"}}
    | {"environment": {"processor": "one", "device": "cpu", "threads": 1, "versions": {"torch": "2"}}}
)


def variation(name: str, *values: float, failed: int = 0) -> Variation:
    cells = tuple(Cell(name, "digits", seed, {}) for seed in range(len(values) + failed))
    return Variation(name, cells, (None,) * len(cells), dict(enumerate(values)))


def compared(a: tuple[float, ...], b: tuple[float, ...], metric: str = "knn", **options: Any) -> dict[str, Any]:
    """Return the comparison of two variants, alone in its table."""
    one = st.difference([y - x for x, y in zip(a, b, strict=True)])
    count = options.pop("count", 1)
    p = None if one.p is None else min(1.0, count * one.p)
    return _comparison(variation("A", *a), variation("B", *b), one, p, count, METRICS[metric], options.get("detect"))


def test_sentence_states_what_was_shown() -> None:
    clear = compared((50.0, 52.0, 51.0), (70.0, 72.5, 71.2))
    assert clear["shown"] and clear["sentence"].startswith("Shown: B is better than A by +20.2 points of k-NN (95 %")
    assert (
        "sign-flip test, which assumes only symmetry, has p 0.250, its smallest value with 3 seeds" in clear["sentence"]
    )
    assert "is worse than" in compared((70.0, 72.5, 71.2), (50.0, 52.0, 51.0))["sentence"]
    lower = compared((0.5, 0.52, 0.51), (0.1, 0.12, 0.115), "alignment")
    assert "B is better than A by -0.398 of alignment" in lower["sentence"]
    many = compared((50.0, 52.0, 51.0, 50.0, 51.0, 52.0, 50.0), (70.0, 72.5, 71.2, 70.0, 70.5, 71.0, 71.0))
    assert many["shown"] and "sign-flip" not in many["sentence"]


def test_sentence_states_the_effect_of_more_seeds() -> None:
    unclear = compared((50.0, 52.0, 51.0), (51.0, 51.5, 52.5), detect=1.0)
    plan, words = unclear["planning"], unclear["sentence"]
    assert not unclear["shown"] and words.startswith("Not shown: B against A is +0.7 points of k-NN")
    assert "does not show that they are equal" in words
    spread = unclear["deviation"]
    assert plan["observed"]["seeds"] == st.seeds_for(unclear["mean"], spread)
    assert plan["observed"]["cautious"] == st.seeds_for(unclear["mean"], st.largest_deviation(spread, 3))
    assert f"A true difference of 1.0 points needs about {plan['stated']['seeds']} seeds in all, cautiously" in words
    corrected = compared((50.0, 52.0, 51.0), (51.0, 51.5, 52.5), count=3)
    assert corrected["planning"]["level"] == pytest.approx(0.05 / 3)
    assert corrected["planning"]["observed"]["seeds"] > plan["observed"]["seeds"]


def test_sentence_states_why_no_test_is_possible() -> None:
    assert "One seed shows nothing" in compared((50.0,), (60.0,))["sentence"]
    assert "no seed has both runs" in compared((), ())["sentence"]
    equal = compared((50.0, 51.0), (51.0, 52.0))
    assert not equal["shown"] and equal["holm_p"] is None and "cannot be tested" in equal["sentence"]
    failed = Variation("B", (Cell("B", "digits", 0, {}),), (FAILED,), {})
    assert failed.failed == 1 and "1 run failed and is not in the means" in " ".join(_notes([failed], METRICS["knn"]))
    assert "is not an accuracy" in _notes([variation("A", 1.0)], METRICS["rankme"])[0]


def test_the_best_is_also_chosen_by_the_other_seeds() -> None:
    rows = [variation("A", 50.0, 60.0), variation("B", 56.0, 51.0), variation("C", 40.0, 40.0)]
    best = best_of(rows, METRICS["knn"])
    assert best is not None and best["name"] == "A" and best["mean"] == 55.0
    assert best["by_other_seeds"] == (50.0 + 51.0) / 2  # by seed 1 A is chosen, by seed 0 B
    assert "the figure of the best is too high on average" in best["sentence"]
    assert best_of([variation("A", 1.0, failed=1), variation("B", 2.0, failed=1)], METRICS["knn"]) is None


def test_the_best_is_chosen_on_one_half_of_the_test_images_and_stated_on_the_other() -> None:
    """Equal variants whose images are luck: the figure of the chosen one is that of images that did not choose it."""
    lucky = {0: (70.0, 50.0), 1: (68.0, 52.0)}
    rows = [replace(variation("A", 60.0, 60.0), halves=lucky), variation("B", 61.0, 61.0), variation("C", 40.0, 40.0)]
    rows[1:] = [replace(row, halves={0: (52.0, 70.0), 1: (50.0, 72.0)}) for row in rows[1:]]
    best = best_of(rows, METRICS["knn"])
    assert best is not None and best["held_out"] and best["by_other_seeds"] == 51.0
    assert best["sentence"].startswith(
        "Best of 3, chosen on one half of the test images: A, 69.0 there and 51.0 on the other half"
    )


def test_halves_of_the_test_images_are_recorded() -> None:
    scores, labels = torch.eye(4)[[0, 1, 2, 3, 0]], torch.tensor([0, 1, 2, 0, 1])
    assert hits(scores, labels)["halves"] == [pytest.approx(2 / 3), 0.5]
    record = FAILED.model_copy(update={"evaluation": {"knn": {"top1": 0.6, "halves": [2 / 3, 0.5]}}})
    assert METRICS["knn"].halves(record) == (pytest.approx(200 / 3), 50.0)
    assert METRICS["clustering"].halves(record) is None and METRICS["probe"].halves(record) is None
    assert halves(torch.ones(1)) == [1.0, None]


KNN = {"simclr": 0.5, "byol": 0.8}
"""Method -> the figure of its runs with seed 0."""


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[list[str]]]:
    """Replace processes by results that depend on method and seed; yield the requested commands."""
    monkeypatch.chdir(tmp_path)
    asked: list[list[str]] = []

    def call(self: Runner, cell: Cell, words: list[str], log: Path) -> dict[str, Any]:
        asked.append(words)
        recipe = cell.recipe().nested() | {"data": "/somewhere/digits"}
        if "--dry-run" in words:
            settings = json.loads(Path(words[words.index("--config") + 1]).read_text())
            planned = {"steps": 700, "epochs": 300} if "budget" in settings else {}
            seconds = {"training": 2, "step": 0.1, "start": 20.0, "evaluation": 28.0}
            return {
                "recipe": recipe | planned | {"budget": settings.get("budget")}, "seconds_estimate": seconds,
                "steps_per_epoch": 4,
            }  # fmt: skip
        log.write_text("its last words")
        method = cell.settings["method.name"]
        if method == "moco":
            raise InbatchError("it crashed")
        if method == "vicreg":
            return {"exit_code": 4, "error": "the loss is nan"}
        knn = KNN[method] + 0.01 * cell.seed + 0.003 * (cell.seed % 2) * (method == "byol")
        unlabelled = {"same_image": {"trained": 0.2 + 0.01 * cell.seed**2, "untrained": 0.1, "better": "higher"}}
        sizes = {"train": {"labelled": 60}, "test": {"labelled": 40}}
        evaluation = None if cell.data == "plain" else {"knn": {"top1": knn}, "linear": {"top1": knn}} | sizes
        return {
            "recipe": recipe, "environment": environment(torch.device("cpu")), "wall_seconds": 3.0, "steps": 4,
            "curve": [], "evaluation": evaluation, "unlabelled": unlabelled,
        }  # fmt: skip

    monkeypatch.setattr(Runner, "_call", call)
    yield asked


def test_a_comparison_from_the_command_line(trained: list[list[str]], tmp_path: Path) -> None:
    line = f"compare '{SIMCLR}' '{BYOL}' {' '.join(FAST)} -o own --detect 1"
    result = one_object(run(f"{line} --json --quiet").stdout)
    assert result["runs"] == {"wanted": 6, "finished": 6, "failed": 0} and result["problems"] == {}
    assert [row["mean"] for row in result["variants"]] == pytest.approx([51.0, 81.1])
    [one] = result["comparisons"]
    assert one["shown"] and one["values"] == pytest.approx([30.0, 30.3, 30.0]) and one["holm_p"] == one["p"]
    commands = [words for words in trained if "--dry-run" not in words]
    assert len(commands) == 6 and len(trained) == 8
    for name in ("comparison.md", "comparison.txt"):
        assert one["sentence"][:40] in (tmp_path / "own" / name).read_text()
    with open(tmp_path / "own" / "comparison.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["seed"]) for row in rows][:4] == [("simclr", str(i)) for i in range(3)] + [
        ("byol", "0")
    ]
    assert rows[0]["method.name"] == "simclr" and float(rows[0]["k-NN"]) == 50
    shown = run(line)
    assert shown.exit_code == 0 and "Shown: byol is better than simclr" in shown.stdout and len(trained) == 8
    more = run(f"compare '{SIMCLR}' '{BYOL}' 'pretrain vicreg' {' '.join(FAST)} -o own --quiet --all-pairs --json")
    comparison = one_object(more.stdout)
    assert len([w for w in trained if "--dry-run" not in w]) == 9  # the six are shared
    assert comparison["runs"] == {"wanted": 9, "finished": 6, "failed": 3} and comparison["variants"][2]["failed"] == 3
    assert [c["holm_p"] is None for c in comparison["comparisons"]] == [False, True, True]
    assert comparison["variants"][2]["failures"] == ["the loss is nan"] * 3
    run(f"compare '{SIMCLR}' 'pretrain vicreg' {' '.join(FAST)} -o own --quiet --retry-failed")
    assert len([w for w in trained if "--dry-run" not in w]) == 12


def test_the_commands_of_the_page_can_be_typed(trained: list[list[str]], tmp_path: Path) -> None:
    """They had the name of the images, not their path, and the page stated seed 0."""
    for i in range(4):
        (tmp_path / "images" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (60 * i, 0, 0)).save(tmp_path / "images" / f"{i % 2}" / f"{i}.png")
    result = inbatch.compare([SIMCLR, BYOL], "images", seeds=[4, 5], epochs=1, out="own", jobs=1, quiet=True)
    for row in result["variants"]:
        assert f"--data {tmp_path / 'images'} " in row["command"] and "--set seed=4" in row["command"]
    page = (tmp_path / "own" / "comparison.md").read_text()
    assert "## Commands (seed 4)" in page and result["variants"][1]["command"] in page


def test_a_crash_keeps_the_other_runs(trained: list[list[str]]) -> None:
    done = run(f"compare '{SIMCLR}' 'pretrain moco' {' '.join(FAST)} -o own --quiet")
    assert done.exit_code == 1 and "it crashed" in done.stderr and "51.0" in done.stdout
    assert len(read_records(Path("own/results"))) == 3


def test_a_budget_gives_every_variant_the_same_time(trained: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_began", None)  # of an earlier command
    result = inbatch.compare(
        [SIMCLR, BYOL], "digits-canvas", settings={"subset": 64}, budget="20m", seeds=2, out="own", jobs=1, quiet=True
    )
    plans = [json.loads(Path(w[w.index("--config") + 1]).read_text()) for w in trained if "--dry-run" in w]
    assert [plan["budget"] for plan in plans] == [270.0, 270.0]
    assert plans[1]["encoder.name"] == "tiny" and "encoder.name" not in plans[0]
    ran = [json.loads(Path(w[w.index("--config") + 1]).read_text()) for w in trained if "--resume" in w]
    [share] = {recipe["budget"] for recipe in ran}  # 1200 s for four runs one after another, each 1.25 * 48 s longer
    assert 270 < share + 60 <= 0.96 * 1200 / 4
    steps = int(700 * share / 270)
    assert all(recipe["steps"] == steps and recipe["epochs"] == -(-steps // 4) for recipe in ran)
    assert any("Equal time, not equal steps" in note and f"byol: {steps}" in note for note in result["notes"])
    asked = len(trained)
    evaluated = [words for words in trained if words[0] == "evaluate"]
    assert len(evaluated) == 4 and evaluated[0][-1] == "knn,linear,clustering"  # on all images, for every run
    inbatch.compare(
        [SIMCLR, BYOL], "digits-canvas", settings={"subset": 64}, budget="20m", seeds=2, out="own", jobs=1, quiet=True
    )
    assert len(trained) == asked  # the stored plan gives the same recipes


def test_a_budget_that_planning_uses_up_is_refused(trained: list[list[str]]) -> None:
    """240 s for two runs: 108 s each before anything is measured, and 60 s to start and evaluate each afterwards."""
    options: dict[str, Any] = {"settings": {"subset": 64}, "seeds": 1, "out": "own", "jobs": 1, "quiet": True}
    with pytest.raises(ConfigError, match=r"a budget of 4 min is too short here.*needs 60 s and 60 s to start"):
        inbatch.compare([SIMCLR, BYOL], "digits-canvas", budget="4m", metric="knn", **options)
    assert not any("--resume" in words for words in trained)
    with pytest.raises(ConfigError, match=r"duration of fine-tuned is not known before the runs: use --epochs"):
        inbatch.compare([SIMCLR, BYOL], "digits-canvas", budget="1h", metric="finetune", **options)


def test_own_code_in_a_variant_is_typed_and_recorded(trained: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNN, "own_code:OwnMethod", 0.7)
    variants = [SIMCLR, "pretrain own_code:OwnMethod --set method.t=0.4", "pretrain --method own_code:OwnMethod"]
    options: dict[str, Any] = {"settings": {"subset": 64}, "epochs": 1, "seeds": 2, "out": "own", "quiet": True}
    result = inbatch.compare(variants, "digits-canvas", **options)
    assert result["runs"]["finished"] == 6 and result["problems"] == {}
    commands = [words for words in trained if "--resume" in words]
    assert sum(words[-2:] == ["--method", "own_code:OwnMethod"] for words in commands) == 4
    [record, *_] = [r for r in read_records(Path("own/results")).values() if r.recipe["method"]["name"] != "simclr"]
    text = Path(own_code.__file__).read_text()
    assert record.recipe["own"] == {"method": {"version": None, "sha256": source_hash(text, "OwnMethod")}}
    assert record.recipe["method"]["t"] in (0.4, 0.2) and not list(Path("own").glob("*:*"))
    inbatch.compare(variants, "digits-canvas", **options)
    assert len([words for words in trained if "--resume" in words]) == 6
    script = inbatch.compare(variants, "digits-canvas", **options | {"out": "array", "slurm": "jobs.sh"})
    assert script["tasks"] == 6 and Path("jobs.sh").read_text().count("'--method own_code:OwnMethod'") == 4
    with pytest.raises(ConfigError, match="own_code has no 'Nothing'"):
        inbatch.compare([SIMCLR, "pretrain own_code:Nothing"], "digits-canvas", **options)


def test_images_without_labels_are_compared_without_accuracy(trained: list[list[str]], tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "plain").mkdir()
    for i in range(4):
        Image.new("RGB", (24, 24), (40 * i, 0, 0)).save(tmp_path / "plain" / f"{i}.png")
    options: dict[str, Any] = {"epochs": 1, "settings": {"batch_size": 2}, "quiet": True}
    result = inbatch.compare([SIMCLR, BYOL], tmp_path / "plain", **options)
    assert result["metric"]["name"] == "same_image" and not result["metric"]["accuracy"]
    assert "is not an accuracy" in " ".join(result["notes"]) and result["out"] == "runs/compare-plain"
    with pytest.raises(DataError, match="has no labels"):
        inbatch.compare([SIMCLR, BYOL], tmp_path / "plain", metric="knn", **options)
    with pytest.raises(DataError, match=r"variant .*: supervised learns from labels"):
        inbatch.compare([SIMCLR, "pretrain supervised"], tmp_path / "plain", **options)
    Image.new("RGB", (24, 24)).save(tmp_path / "plain" / "more.png")
    with pytest.raises(ConfigError, match=r"runs on other images.*number of images: 4, now 5"):
        inbatch.compare([SIMCLR, BYOL], tmp_path / "plain", **options)


@pytest.mark.grid(5)
@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (f"'{SIMCLR}' '{SIMCLR} --set method.temperature=0.5' --set method.temperature=0.5", 2, "are the same recipe"),
        (f"'{SIMCLR}' '{SIMCLR} --set cache_on_device=false'", 2, "would share every run"),
        (f"'{SIMCLR}' 'pretrain simclrr'", 2, "variant 'pretrain simclrr'"),
        (f"'{SIMCLR}'", 2, "at least two variants"),
        (f"'{SIMCLR}' '{BYOL}' --metric kn", 2, "metric = 'kn' is unknown"),
        (f"'{SIMCLR}' '{BYOL}' --seeds x", 2, "--seeds"),
        (f"'{SIMCLR}' '{BYOL}' --seeds 1,1", 2, "give different seeds"),
        (f"'{SIMCLR}' '{BYOL}' --set seed=3", 2, "use --seeds"),
        (f"'{SIMCLR}' '{BYOL}' --detect 0", 2, "above 0"),
        (f"'{SIMCLR}' '{BYOL}' --slurm -o own", 2, "--slurm needs the file of the script, and got -o"),
        (f"'{SIMCLR}' '{BYOL}' --budget 2h", 2, "both set the length"),
        (f"'{SIMCLR}' '{BYOL}' -o /proc/own", 1, "Cannot write /proc/own"),
        (f"'{SIMCLR}' '{BYOL}' --data nowhere", 3, "nowhere"),
    ],
)
def test_a_wrong_comparison_writes_nothing(
    words: str, code: int, says: str, trained: list[list[str]], tmp_path: Path
) -> None:
    base = FAST[2:] if "--data" in words else FAST
    done = run(f"compare {words} {' '.join(base)} --quiet")
    assert done.exit_code == code and says in done.output, done.output
    assert trained == [] and list(tmp_path.iterdir()) == []


def test_runs_as_an_array_of_slurm_jobs(trained: list[list[str]], tmp_path: Path) -> None:
    line = f"compare '{SIMCLR}' '{BYOL}' {' '.join(FAST)} -o 'my own' --seeds 2"
    result = one_object(run(f"{line} --slurm jobs.sh --json --quiet").stdout)
    assert result["tasks"] == 4 and trained == []
    script = (tmp_path / "jobs.sh").read_text()
    assert "#SBATCH --array=0-3\n" in script and "#SBATCH --requeue\n" in script and script.count("--job-name") == 2
    subprocess.run(["bash", "-n", "jobs.sh"], check=True)
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "inbatch", "srun"):  # each writes its words, and sbatch a number of a job
        file = tmp_path / "bin" / name
        file.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {name}.log\necho 17\n')
        file.chmod(0o755)
    paths = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    subprocess.run(["bash", "jobs.sh"], check=True, env=paths, capture_output=True)
    words = (tmp_path / "sbatch.log").read_text()
    assert "--dependency=afterany:17" in words and "pretrain\\ byol" in words and "--no-run" in words
    subprocess.run(["bash", "jobs.sh", "render"], check=True, env=paths, capture_output=True)
    rendered = (tmp_path / "inbatch.log").read_text().splitlines()
    assert rendered[:3] == ["compare", SIMCLR, BYOL] and rendered[-1] == "--no-run"
    subprocess.run(["bash", "jobs.sh"], env=paths | {"SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "9"}, check=True)
    words = (tmp_path / "srun.log").read_text().splitlines()
    folder = words[words.index("--out") + 1]
    assert words[words.index("--config") + 1] == f"{folder}.json" and folder.startswith("my own/simclr-")
    assert json.loads(Path(f"{folder}.json").read_text())["seed"] == 1
    (tmp_path / "bin" / "inbatch").unlink()  # not in PATH: the interpreter that wrote the script
    ended = subprocess.run(["bash", "-x", "jobs.sh", "4"], env=paths, capture_output=True, text=True)
    assert f"{sys.executable} -m" in ended.stderr
    wrong = subprocess.run(["bash", "jobs.sh", "4"], env=paths, capture_output=True, text=True)
    assert wrong.returncode != 0 and "no run has this number" in wrong.stderr
    assert run(f"{line.replace('--epochs 1', '')} --budget 2h --slurm jobs.sh").exit_code == 2


@pytest.mark.slow
def test_every_metric_finds_its_figure_in_an_evaluation() -> None:
    encoder = create_encoder("tiny", size=20, channels=1).eval()
    bank, queries = (open_data("digits-canvas", split, subset=n) for split, n in (("train", 120), ("test", 40)))
    protocols = ("knn", "linear", "clustering", "retrieval", "few", "finetune", "corruptions")
    tuning = replace(TUNINGS["small"], epochs=1, steps=2)
    evaluation = evaluate(encoder, bank, queries, k=20, protocols=protocols, draws=1, tuning=tuning, most=8)
    record: Any = SimpleNamespace(evaluation=evaluation)
    for name, metric in METRICS.items():
        if metric.labels:
            assert metric.value(record) is not None, name
            halved = name in ("knn", "probe", "few", "map", "finetune")
            assert (metric.halves(record) is not None) == halved, name


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_tasks_of_the_array_and_the_table_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task trains its run without SLURM; the table is that of runs that the command makes itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    variants = [SIMCLR, "pretrain simclr --set method.temperature=0.1"]
    options: dict[str, Any] = {"settings": {"subset": 80, "batch_size": 16}, "epochs": 1, "seeds": 2, "quiet": True}
    script = inbatch.compare(variants, "digits-canvas", out="array", slurm="jobs.sh", **options)
    for task in range(script["tasks"]):
        subprocess.run(["bash", "jobs.sh", str(task)], check=True, capture_output=True)
    array = inbatch.compare(variants, "digits-canvas", out="array", run=False, **options)
    direct = inbatch.compare(variants, "digits-canvas", out="direct", jobs=1, **options)
    assert array["runs"] == {"wanted": 4, "finished": 4, "failed": 0}
    assert [row["values"] for row in array["variants"]] == [row["values"] for row in direct["variants"]]


def test_credentials_of_a_url_are_refused_and_its_last_part_names_the_folder(tmp_path: Path) -> None:
    url = "s3://AKIA:hunter2@bucket/train.tar?sig=deadbeef"
    with pytest.raises(ConfigError, match=r"'s3://bucket/train\.tar' was given with credentials in its URL") as caught:
        inbatch.compare(["pretrain simclr", "pretrain byol"], url, epochs=1, out=tmp_path / "own")
    assert not any(secret in str(caught.value) for secret in ("AKIA", "hunter2", "deadbeef"))
    assert not list(tmp_path.iterdir())
    variants = tuple(variants_of(["pretrain simclr", "pretrain byol"]))
    assert Request(variants, "s3://bucket/train.tar", (0,)).name == "train.tar"
