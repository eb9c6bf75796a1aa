"""Triton's kernels: through its interpreter on every machine, on the GPU if there is one."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels_interpreted import Case, cases, errors, sigmoids

from inbatch.nn import exponentials, triton_logsumexp
from inbatch.nn.pair_weights import SameGroup

CASES = [case[0] for case in cases()] + [f"symmetric {n} T={t}" for n in (1, 5, 130) for t in (0.07, 0.003)]
CUDA = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs an NVIDIA card of compute capability 8.0 or more",
)


def python(*words: str, **variables: str) -> str:
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=plain | variables)
    if "only 0-dimensional arrays can be converted" in done.stderr and "triton/runtime/interpreter.py" in done.stderr:
        pytest.skip("Triton's interpreter, of this version, does not work with a NumPy as new as this one")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the results of the script: one process for all cases that this session tests."""
    pytest.importorskip("triton", reason="Triton is not installed")
    script = Path(__file__).parents[1] / "helpers" / "kernels_interpreted.py"
    wanted = [item.callspec.params["case"] for item in request.session.items if _looks_at_a_case(item)]
    done = python("-W", "ignore", str(script), *wanted, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    return json.loads(done) | {"wanted": wanted}


def _looks_at_a_case(item: pytest.Item) -> bool:
    return getattr(item, "originalname", "") == "test_values_and_gradients" and "case" in item.callspec.params


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, results: dict[str, Any]) -> None:
    measured = results["cases"][case]
    assert measured.keys() == {"lse", "mean", "queries", "both", "keys"}
    assert all(error <= 1 for error in measured.values()), measured  # fails for NaN


@pytest.mark.slow
def test_every_case_is_looked_at(results: dict[str, Any]) -> None:
    assert sorted(results["cases"]) == sorted(results["wanted"] or CASES)


@pytest.mark.slow
def test_losses_go_through_them_whole_and_in_shares(results: dict[str, Any]) -> None:
    measured = results["tiled"]
    assert len(measured) == 20 and all(error < 2e-5 for error in measured.values()), measured


@pytest.mark.slow
def test_sums_of_sigmoids(results: dict[str, Any]) -> None:
    measured = results["sigmoids"]
    assert len(measured) == 12 and all(error <= 1 for error in measured.values()), measured


def test_weights_that_are_not_groups_use_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel cannot call a function in Python; the choice is made in one place, for all sums."""

    class Own:
        def tile(self, rows: slice, columns: slice) -> torch.Tensor:
            return torch.ones(rows.stop - rows.start, columns.stop - columns.start)

    monkeypatch.setattr(triton_logsumexp, "usable", lambda *tensors: True)
    x, ids = torch.ones(2, 3), torch.arange(2)
    chosen = [exponentials.on_kernels(x, x, w) for w in (None, SameGroup(ids, ids), SameGroup(ids, ids, 0.5, ids, ids))]
    assert chosen == [True, True, True] and not exponentials.on_kernels(x, x, Own())


@pytest.mark.slow
def test_half_precision_and_strides(results: dict[str, Any]) -> None:
    assert results["types"] == {"torch.float32": 0, "torch.bfloat16": 0, "torch.float16": 0}


@pytest.mark.slow
def test_refusals(results: dict[str, Any]) -> None:
    assert results["refused"] == dict.fromkeys(["nothing", "float64", "wide", "no device"], False)


@pytest.mark.slow
def test_plain_tensors_and_plain_imports_need_no_triton() -> None:
    python(
        "-c",
        """
import sys, torch
import inbatch, inbatch.losses, inbatch.nn.triton_logsumexp, inbatch.nn.functional
assert not inbatch.nn.triton_logsumexp.usable(torch.ones(2, 3))
assert "triton" not in sys.modules
""",
    )


def test_no_columns_are_lost_in_the_dealing() -> None:
    widths, rows_of = (3, 64, 128, 256), (1, 100, 4096, 100_000)
    sizes = product(("float32", "tf32x3", "bf16"), widths, rows_of, (0, 1, 511, 4096, 100_003))
    for products, width, rows, columns in sizes:
        tile = triton_logsumexp.tile_of(products, width)
        parts, span = triton_logsumexp.split_columns(rows, columns, tile)
        assert span % tile["BLOCK_N"] == 0
        assert (parts - 1) * span < max(columns, 1) <= parts * span  # no empty program, no missing column
        blocks = -(-rows // tile["BLOCK_M"])
        assert parts == 1 or blocks * parts <= triton_logsumexp.PROGRAMS
        assert parts == 1 or parts * rows * tile["WIDTH"] * 4 <= 32 * 2**20


@CUDA
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case[0])
def test_kernels_on_a_gpu_equal_float64(case: Case) -> None:
    assert triton_logsumexp.usable(torch.ones(1, 1, device="cuda"))
    measured = errors(case, "cuda")
    assert all(error <= 1 for error in measured.values()), measured


@CUDA
def test_sums_of_sigmoids_on_a_card() -> None:
    measured = sigmoids("cuda")
    assert all(error <= 1 for error in measured.values()), measured


@CUDA
def test_equal_bits_on_a_card() -> None:
    q = torch.randn(1000, 64, device="cuda")
    for products in ("float32", "tf32x3", "bf16"):
        first, second = (triton_logsumexp.forward(q, q, 1.0, True, 0, 1000, True, products) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_benchmark_without_a_gpu_exits_with_1() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 1 and "no CUDA device" in done.stderr and "Traceback" not in done.stderr
