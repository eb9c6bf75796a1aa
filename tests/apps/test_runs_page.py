"""The page of many runs: what it reads and writes, and in Chromium that it draws, filters, sorts and compares."""

import base64
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import chromium
import pytest
from command_line import one_object, run

from inbatch.apps.reports.runs_page import contents
from inbatch.apps.reports.runs_page.contents import collect_runs
from inbatch.apps.reports.runs_page.page import render_runs
from inbatch.errors import ConfigError, DataError

EVIL = "<img src=x onerror=alert(1)>&\"'"


def write_run(folder: Path, method: str, seed: int, knn: float, *, finished: bool = True, **recipe: Any) -> Path:
    """Write the files of a run that the page reads: ten steps, an evaluation at 0, 5 and 10, a second per step."""
    folder.mkdir(parents=True)
    settings = {"data": "digits", "method": {"name": method, "temperature": 0.5}, "encoder": {"name": "tiny"}}
    settings |= {"seed": seed, "epochs": 2} | recipe
    (folder / "recipe.json").write_text(json.dumps(settings))
    (folder / "run.json").write_text(json.dumps({"status": "finished" if finished else "preempted", "steps": 10}))
    curve = [
        {"step": 5 * i, "epoch": i, "knn": knn * i / 2, "feature_std": 0.2 * i, "rankme": 5.0 + i}
        | ({"loss": 5.0 - i} if i else {})
        for i in range(3 if finished else 2)
    ]
    lines = [{"step": 0, "training_seconds": 0.0}, {k: v for k, v in curve[0].items() if k != "epoch"}]
    for step in range(1, 5 * len(curve) - 4):
        lines.append({"step": step, "epoch": (step - 1) // 5, "loss": 4.0 + step, "elapsed": float(step)})
        lines += [{k: v for k, v in one.items() if k not in ("epoch", "loss")} for one in curve if one["step"] == step]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 6, "lo')
    if finished:
        evaluation = {"knn": {"top1": knn}, "linear": {"top1": knn + 0.1}, "clustering": {"nmi": None}}
        result = {"recipe": settings, "curve": curve, "evaluation": evaluation, "wall_seconds": 12.0, "steps": 10}
        (folder / "result.json").write_text(json.dumps(result | {"collapsed": []}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    for seed in range(2):
        write_run(root / f"simclr-{seed}", "simclr", seed, 0.5 + 0.1 * seed)
    write_run(root / "deep" / EVIL.replace("/", ""), "byol", 0, 0.8, batch_size=64)
    write_run(root / "moco", "moco", 0, 0.4, finished=False)
    (root / "broken").mkdir()
    (root / "broken" / "recipe.json").write_text("[")
    return root


def test_runs_are_read_at_any_depth(folder: Path) -> None:
    runs, problems = collect_runs([folder])
    assert [run["name"] for run in runs] == [f"deep/{EVIL}", "moco", "simclr-0", "simclr-1"]
    assert len(problems) == 1 and "broken" in problems[0]
    byol, moco, first, _ = runs
    assert byol["settings"]["batch_size"] == "64" and byol["settings"]["method.name"] == "byol"
    assert first["figures"]["knn"] == 0.5 and first["figures"]["linear"] == 0.6 and first["figures"]["nmi"] is None
    assert first["seconds"] == 12.0 and [point["time"] for point in first["curve"]] == [1.0, 5.0, 10.0]
    assert [point["epoch"] for point in first["curve"]] == [0.0, 1.0, 2.0]
    assert moco["status"] == "preempted" and moco["figures"]["knn"] == 0.2 and moco["seconds"] == 5.0
    assert [point["loss"] for point in moco["curve"]] == [None, 7.0]  # the mean of steps 1 to 5: 5, 6, 7, 8, 9
    assert contents._time(3, [(2, 4.0), (4, 8.0)], None, None) == 6.0
    assert contents._time(3, [], 6, 10.0) == 5.0 and contents._time(3, [], None, None) is None


def test_epochs_of_a_length_in_steps_are_those_made(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "simclr", 0, 0.5, epochs=1000)
    write_run(tmp_path / "b", "simclr", 1, 0.5, epochs=1000, steps=10)
    assert [run["epochs"] for run in collect_runs([tmp_path])[0]] == [1000, 2.0]


def test_records_and_single_runs(folder: Path, tmp_path: Path) -> None:
    records = tmp_path / "records"
    records.mkdir()
    result = json.loads((folder / "simclr-0" / "result.json").read_text())
    (records / "one.json").write_text(json.dumps(result | {"status": "finished", "training_seconds": 20.0}))
    (records / "crops.json").write_text(json.dumps({"recipe": {"crops": "big"}}))
    runs, problems = collect_runs([records, folder / "simclr-1"])
    assert [run["name"] for run in runs] == ["records/one", "runs/simclr-1"] and "crops.json" in problems[0]
    assert [point["time"] for point in runs[0]["curve"]] == [0.0, 10.0, 20.0]


def test_folder_without_a_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for place, says in (("nowhere", "is not a folder"), ("empty", "holds no run")):
        with pytest.raises(ConfigError, match=says):
            collect_runs([tmp_path / place])
    (tmp_path / "empty" / "a.json").write_text("{}")
    with pytest.raises(DataError, match="no run can be read"):
        collect_runs([tmp_path / "empty"])
    monkeypatch.setattr(contents, "MOST", 0)
    with pytest.raises(ConfigError, match="too many"):
        collect_runs([tmp_path / "empty"])


def test_the_page_holds_everything_and_allows_no_request(folder: Path) -> None:
    runs, _ = collect_runs([folder])
    page = render_runs(runs)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None and json.loads(data[1])["runs"] == runs
    assert EVIL not in page and "<img" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None and policy[1].startswith("default-src &#39;none&#39;;") and "unsafe" not in policy[1]
    for tag in ("script", "style"):
        text = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[-1]
        assert f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}" in policy[1]
    assert not re.findall(r'(?:src|href)="(?!data:,)', page) and "http" not in page.replace("http-equiv", "").replace(
        "http://www.w3.org/2000/svg", ""
    )


def test_the_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = run(f"runs {folder} -o {out}")
    assert result.exit_code == 0 and "4 runs" in result.stdout and "not on the page" in result.stderr
    assert one_object(run(f"runs {folder} -o {out} --json").stdout)["runs"] == 4
    assert run(f"runs {folder} -o {tmp_path}/page.txt").exit_code == 2
    assert run(f"runs {folder} -o /proc/page.html").exit_code == 1


@pytest.mark.slow
@pytest.mark.skipif(chromium.PROGRAM is None, reason="needs Chromium")
@pytest.mark.skipif(sys.platform != "linux", reason="drives Chromium over inherited pipes")
def test_the_page_in_chromium(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / 'a "page" #1.html'
    run(f"runs {folder} -o '{out}'")
    names = "[...document.querySelectorAll('#runs tbody tr')].map((row) => row.run.name)"
    curves = "document.querySelectorAll('svg[data-measure=knn] .curve').length"
    with chromium.chromium("--disable-gpu") as page:
        page.size(1400, 900)
        page.open(out)
        assert page.run(names) == [f"deep/{EVIL}", "simclr-1", "simclr-0", "moco"]  # by k-NN
        assert page.run("document.querySelector('#runs label').textContent") == f"deep/{EVIL}"
        assert page.run(curves) == 4 and page.run("document.querySelectorAll('svg[role=img]').length") == 4
        first = page.run("document.querySelector('svg[data-measure=knn] .curve').getAttribute('d')")
        assert first == "M46.0 187.5L188.0 103.0L330.0 18.5"  # 0, 40 and 80 % between -4 and 84
        settings = "[...document.querySelectorAll('#differences tbody th')].map((cell) => cell.textContent)"
        assert page.run(settings) == ["batch_size", "method.name", "seed"]
        dashes = "[...document.querySelectorAll('.swatch path')].map((path) => path.getAttribute('stroke-dasharray'))"
        assert len(set(page.run(dashes))) == 4  # the curves differ also without colours
        page.key("/")
        page.call("Input.insertText", text="simclr seed=0")
        assert page.run(names) == ["simclr-0"]
        page.run("(() => { const f = document.getElementById('filter'); f.value = 'knn>0.45 method=SIMCLR'; "
                 "f.dispatchEvent(new Event('input')); })()")  # fmt: skip
        assert page.run(names) == ["simclr-1", "simclr-0"]
        page.run("document.activeElement.blur()")  # Escape would also clear the filter
        page.key("c")
        assert page.run(curves) == 0
        assert "Draw two or more" in page.run("document.getElementById('differences').textContent")
        page.key("a")
        assert page.run(curves) == 2 and page.run(settings) == ["seed"]
        page.run("document.querySelector('#runs th button').click()")
        assert page.run(names) == ["simclr-0", "simclr-1"]
        assert page.run("document.querySelector('#runs th').getAttribute('aria-sort')") == "ascending"
        page.key("x")
        page.key("x")
        assert page.run("document.getElementById('axis').value") == "time"
        page.run("document.querySelector('svg[data-measure=knn]').focus()")
        for _ in range(41):
            page.key("ArrowRight")
        reading = page.run("document.getElementById('reading').textContent")
        assert reading == "k-NN accuracy, 10 s: simclr-1 60.0 %; simclr-0 50.0 %"
        page.key("d")
        assert page.run("document.documentElement.dataset.theme") == "dark"
        page.size(400, 800, prefers_color_scheme="dark")
        assert page.run("document.documentElement.scrollWidth") == 400
        assert not page.errors and page.requests == [out.as_uri()]
        assert "fetch" in page.run("fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => String(error))")
