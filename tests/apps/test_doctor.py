"""Messages of `inbatch doctor`, on simulated machines and on this one."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from inbatch.apps import doctor, forecast
from inbatch.apps.cli import app
from inbatch.runtime import tuning
from inbatch.training import advice

CPU = torch.device("cpu")
Change = Callable[..., None]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Change:
    """Simulate a machine without findings; call the fixture to change one of its properties."""

    def change(**what: object) -> None:
        for name, value in what.items():
            for module in (advice, doctor):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, value)

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(tuning, "keeps_memory", True)
    monkeypatch.setattr(advice.numba_backend, "available", lambda: True)
    change(cores=lambda: 4, affine=lambda: 4, others_busy=lambda: 0.1, fast_jpeg=lambda: True)
    change(shutil=SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=2**34)))
    return change


def test_no_advice_if_all_settings_are_in_use(quiet: Change) -> None:
    assert advice.advice(CPU, 32, 0) == ""
    assert not [finding for finding in doctor.examine("cpu") if finding.advice]


def test_threads(quiet: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(cores=lambda: 16, affine=lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert advice.advice(CPU, 32, 0) == ""  # torch itself takes fewer threads if cores share a multiplier
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert "OMP_NUM_THREADS=16" in advice.advice(CPU, 32, 0) and "OMP" not in advice.advice(torch.device("cuda"), 32, 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "OMP_NUM_THREADS=8" in advice.advice(CPU, 32, 0)
    findings = {finding.what: finding for finding in doctor.examine("cpu")}
    assert findings["threads"].state == "4 threads on 16 cores of 64, by quota"


def test_busy_cores_are_reported(quiet: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(others_busy=lambda: 1.2)
    message = advice.advice(CPU, 32, 0)
    assert "other processes keep 1.2 cores busy" in message and "OMP_NUM_THREADS=3" in message
    monkeypatch.setattr(tuning, "tuned", True)  # a run of the program takes fewer itself
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert advice.advice(CPU, 32, 0) == ""
    load = {finding.what: finding.state for finding in doctor.examine("cpu")}["load"]
    assert load == "other processes keep 1.2 cores busy; a run computes with 3 threads meanwhile"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    quiet(cores=lambda: 1)
    assert advice.advice(CPU, 32, 0) == ""  # one thread waits for no other


def test_missing_libraries_and_small_shared_memory(quiet: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice.numba_backend, "available", lambda: False)
    quiet(fast_jpeg=lambda: False)
    quiet(shutil=SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=2**26)))
    small, message = advice.advice(CPU, 32, 0), advice.advice(CPU, 224, 2)
    assert "simplejpeg" in small and "fast]" not in small and "MB" not in small
    assert "inbatch[fast]" not in advice.advice(torch.device("cuda"), 224, 2)
    assert message.startswith("Could be faster: ") and message.endswith("(details: inbatch doctor).")
    assert "inbatch[fast]" in message and "pip install simplejpeg" in message
    assert "67 MB" in message and "\n" not in message


def test_own_script_is_advised_to_call_tune(quiet: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "keeps_memory", False)
    monkeypatch.setattr(tuning, "tuned", False)
    assert "inbatch.tune()" in advice.advice(CPU, 32, 0)
    monkeypatch.setattr(tuning, "tuned", True)  # tune() was called, and a user's setting kept the allocator unchanged
    assert advice.advice(CPU, 32, 0) == ""


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = tmp_path / "cache" / ("0" * 64)
    entry.mkdir(parents=True)
    (entry / "images.bin").write_bytes(bytes(5_000_000))
    (entry / "entry.json").write_text(json.dumps({"name": "photos"}))
    monkeypatch.setenv("INBATCH_CACHE", str(tmp_path / "cache"))
    shown = CliRunner().invoke(app, ["doctor", "--no-measure"])
    assert shown.exit_code == 0 and "precision" in shown.stdout and "10 GB used" in shown.stdout
    result = CliRunner().invoke(app, ["doctor", "--no-measure", "--clear-cache", "--json"])
    report = json.loads(result.stdout)
    assert report["cleared_bytes"] >= 5_000_000 and not entry.exists() and report["measured"] is None
    assert CliRunner().invoke(app, ["doctor", "--device", "tpu"]).exit_code == 2
    monkeypatch.setenv("INBATCH_CACHE_GB", "much")
    assert CliRunner().invoke(app, ["doctor", "--no-measure"]).exit_code == 2


def test_the_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(finding.state == "not measured: no time is left" for finding in forecast.forecast(until=0.0))
    monkeypatch.setattr(forecast, "time_steps", lambda built, limit: 0.1)
    estimates = {finding.what: finding.state for finding in forecast.forecast()}
    assert estimates["quickstart"] == "about 43 s"  # 200 steps of 0.1 s and the work between them
    assert estimates["a budget of 1 h"].startswith("about 30,600 steps of 128 images, 3.9 million images")


def test_the_command_forecasts_before_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    empty: dict[str, Any] = {
        "ceilings": {"failed": "no time"},
        "encoder": {"as torch ships": {}},
        "threads": 1,
        "batch": 4,
    }
    monkeypatch.setattr(forecast, "forecast", lambda until: asked.append("forecast") or [])
    monkeypatch.setattr(doctor, "measure", lambda until: asked.append("measure") or empty)
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    assert asked == ["forecast", "measure"]


FAKE = """
import json, sys, time
job = json.loads(sys.argv[1])
if job["make"] == "ceilings":
    rates = {"float32": 40e9, "bf16": 80e9 if job["bf16"] else None, "copy": 8e9}
else:
    sys.stdin.readline()
    rates = {}
    if "HANGS":
        time.sleep(600 * (job["channels_last"] and not job.get("tune")))
print(json.dumps(rates), flush=True)
for _ in sys.stdin:
    print(json.dumps({"units": 2 * job["batch"], "seconds": 0.5}), flush=True)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.dtype, str], None]:
    """Replace the measuring processes by fixed results, with or without bf16 products; one of them may hang."""
    from inbatch.apps.bench import benchmark, runner

    def change(precision: torch.dtype, hangs: str = "") -> None:
        (tmp_path / "fake.py").write_text(FAKE.replace("HANGS", hangs))
        monkeypatch.setattr(runner, "SCRIPT", tmp_path / "fake.py")
        for module in (doctor, benchmark):
            monkeypatch.setattr(module, "precision_for", lambda name, device: precision)

    return change


@pytest.mark.slow
def test_bf16_is_measured_only_where_it_is_multiplied(fake: Callable[..., None]) -> None:
    fake(torch.float32)
    measurement = doctor.measure()
    assert measurement["ceilings"]["bf16"] is None and len(measurement["encoder"]) == 3
    assert not any(doctor.IMPLEMENTATIONS[who]["bf16"] for who in measurement["encoder"])
    rows = dict(row[:2] for row in doctor.measurement_rows(measurement))
    assert rows["products in bf16"] == "not measured: this processor does not multiply bf16"
    fake(torch.bfloat16)
    measurement = doctor.measure()
    assert list(measurement["encoder"]) == list(doctor.IMPLEMENTATIONS)
    assert ("products in bf16", "80 GFLOP/s", "2.00") in doctor.measurement_rows(measurement)


def test_measurement_uses_the_threads_of_a_run_on_a_busy_machine(
    quiet: Change, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(torch.float32)
    quiet(others_busy=lambda: 1.0)
    monkeypatch.setattr(doctor, "adapts", lambda device: True)
    assert doctor.measure()["threads"] == 3
    monkeypatch.setattr(doctor, "adapts", lambda device: False)
    assert doctor.measure()["threads"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["LIMIT", "BUDGET", "until"])
def test_slow_measurement_is_named_and_the_others_are_made(
    fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    fake(torch.float32, "hangs")
    if limit != "until":
        monkeypatch.setattr(doctor, limit, 2.5)
    began = time.monotonic()
    measurement = doctor.measure(until=began + 2.5 if limit == "until" else math.inf)
    assert time.monotonic() - began < 40
    first, second, third = measurement["encoder"].values()
    assert "not measured: stopped after" in second["failed"]
    if limit == "LIMIT":
        assert first["rate"] == third["rate"] == 4 * measurement["batch"]
        assert dict(row[:2] for row in doctor.measurement_rows(measurement))["channels_last"] == second["failed"]


def test_ceilings_that_take_too_long_are_named(fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    fake(torch.float32)
    monkeypatch.setattr(doctor, "LIMIT", 0.0)
    measurement = doctor.measure()
    assert doctor.measurement_rows(measurement)[0][:2] == ("products and copies", measurement["ceilings"]["failed"])
    assert "stopped after" in measurement["ceilings"]["failed"] and measurement["batch"] == 4


def test_a_slow_processor_gets_a_small_batch() -> None:
    assert [doctor.batch_for(rate) for rate in (0, 40e9, 200e9, 350e9, 5e12)] == [4, 4, 8, 16, 32]


@pytest.mark.slow
def test_settings_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: doctor.IMPLEMENTATIONS[name] for name in list(doctor.IMPLEMENTATIONS)[::5]}
    assert [chosen.get("tune", False) for chosen in few.values()] == [False, True]
    monkeypatch.setattr(doctor, "IMPLEMENTATIONS", few)
    measurement = doctor.measure(quick=True)
    assert measurement["ceilings"]["float32"] > 0 and all(row["rate"] > 0 for row in measurement["encoder"].values())
    rows = doctor.measurement_rows(measurement)
    assert len(rows) == 5 and rows[3][2] == "1.00"
    measurement["encoder"][next(iter(few))] = {"failed": "out of memory"}
    assert doctor.measurement_rows(measurement)[3][1] == "out of memory"
