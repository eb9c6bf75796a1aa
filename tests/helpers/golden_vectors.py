"""Conformance vectors computed by the authors' code."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from inbatch.batch import Batch

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


class Case:
    """One conformance vector: its arrays as tensors of one dtype, and its tolerance for that dtype."""

    def __init__(self, folder: Path, name: str, dtype: torch.dtype = torch.float64) -> None:
        entry = manifest(folder)[name]
        self.options = entry["hyperparameters"]
        self.tolerances = entry["suggested_tolerance"]
        self.tolerance = self.tolerances[str(dtype).removeprefix("torch.")]
        self.arrays = dict(np.load(folder / entry["file"], allow_pickle=False))
        self.dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.from_numpy(self.arrays[name])
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def leaf(self, name: str) -> Tensor:
        return self[name].clone().requires_grad_()

    def check(self, actual: Tensor, name: str, step: int | None = None) -> None:
        expected = self.arrays[name] if step is None else self.arrays[name][step]
        np.testing.assert_allclose(actual.detach().numpy(), expected, **self.tolerance, err_msg=name)


@functools.cache
def manifest(folder: Path) -> dict[str, dict]:
    return {case["id"]: case for case in json.loads((folder / "manifest.json").read_text())["cases"]}


def unlabelled(n: int) -> Batch:
    return Batch(torch.arange(n), torch.full((n,), -1))
