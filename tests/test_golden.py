"""Every method against vectors that the authors' own code computed: values, gradients and state over steps."""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from inbatch.batch import Batch
from inbatch.functional import logsumexp_rows
from inbatch.losses import info_nce, nt_xent, supcon
from inbatch.memory import Queue
from inbatch.methods import METHODS
from inbatch.tower import follow

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


class Case:
    """One conformance vector: its arrays as tensors of one type, and its tolerance for that type."""

    def __init__(self, folder: Path, name: str, dtype: torch.dtype) -> None:
        entry = manifest(folder)[name]
        self.options = entry["hyperparameters"]
        self.tolerance = entry["suggested_tolerance"][str(dtype).removeprefix("torch.")]
        self.arrays = dict(np.load(folder / entry["file"], allow_pickle=False))
        self.dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.from_numpy(self.arrays[name])
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def leaf(self, name: str) -> Tensor:
        return self[name].clone().requires_grad_()

    def check(self, found: Tensor, name: str, step: int | None = None) -> None:
        expected = self.arrays[name] if step is None else self.arrays[name][step]
        np.testing.assert_allclose(found.detach().numpy(), expected, **self.tolerance, err_msg=name)


@functools.cache
def manifest(folder: Path) -> dict[str, dict]:
    return {case["id"]: case for case in json.loads((folder / "manifest.json").read_text())["cases"]}


def test_files_are_the_manifest_s(golden: Path) -> None:
    for name, case in manifest(golden).items():
        assert hashlib.sha256((golden / case["file"]).read_bytes()).hexdigest() == case["sha256"], name
    assert {case["file"] for case in manifest(golden).values()} == {file.name for file in golden.glob("*.npz")}


@DTYPES
@pytest.mark.parametrize("name", ["ntxent__1", "ntxent__2", "ntxent__3"])
def test_nt_xent(golden: Path, name: str, dtype: torch.dtype) -> None:
    """The paper's mean, and the authors' sum of the views' means with its gradient, through function and method."""
    case = Case(golden, name, dtype)
    for views, expected, factor in (("mean", "loss", 1), ("sum", "loss_official_tf", 2)):
        method = METHODS["simclr"](temperature=case.options["temperature"], scale=views)
        z0, z1 = case.leaf("z0"), case.leaf("z1")
        z = torch.stack([z0, z1])
        loss = nt_xent(z, case.options["temperature"], views)
        assert torch.equal(method.loss({"projection": z}, {}, unlabelled(len(z0)))["loss"], loss)
        case.check(loss, expected)
        loss.backward()
        case.check(z0.grad / factor, "grad_z0")
        case.check(z1.grad / factor, "grad_z1")


@DTYPES
@pytest.mark.parametrize("name", ["moco_infonce__1", "moco_infonce__2"])
def test_info_nce(golden: Path, name: str, dtype: torch.dtype) -> None:
    case = Case(golden, name, dtype)
    t, queue = case.options["temperature"], case["queue"].T
    q, k = case.leaf("q"), case.leaf("k")
    loss = info_nce(q, k, queue, t)
    case.check(loss, "loss")
    loss.backward()
    case.check(q.grad, "grad_q")
    assert k.grad is None  # a constant to the reference

    # What stands in the equation's two log-sum-exps is the reference's matrix of logits.
    logits = case["logits"]
    unit = torch.nn.functional.normalize(q.detach(), dim=1)
    positive = (unit * torch.nn.functional.normalize(k.detach(), dim=1)).sum(1) / t
    torch.testing.assert_close(positive, logits[:, 0], **case.tolerance)
    torch.testing.assert_close(logsumexp_rows(unit, queue, t), logits[:, 1:].logsumexp(1), **case.tolerance)

    # The same through the method, whose queue holds this step's keys only afterwards.
    method = moco(case, case["queue"])
    rows = {"projection": q.detach()[None]}, {"projection": k.detach()[None]}, unlabelled(len(q))
    case.check(method.loss(*rows)["loss"], "loss")
    case.check(method.queue.rows.T, "queue")
    method.after_step(*rows, 0.0)
    case.check(method.queue.rows.T, "queue_after")
    assert method.queue.pointer == case["queue_ptr_after"]


@DTYPES
def test_moco_over_steps(golden: Path, dtype: torch.dtype) -> None:
    """Momentum encoder, queue and pointer over five steps, past the end of the queue.

    The authors let the key encoder follow before it encodes, we after the optimiser: the same, one step's end
    being the next one's start.
    """
    case = Case(golden, "moco_steps__1", dtype)
    online, target = linear(case["wq"][0], case["bq"][0]), linear(case["wk0"], case["bk0"])
    method = moco(case, case["queue0"])
    for step in range(case.options["steps"]):
        online.load_state_dict({"weight": case["wq"][step], "bias": case["bq"][step]})
        follow(target, online, method.momentum(step / case.options["steps"]))
        case.check(target.weight, "wk", step)
        case.check(target.bias, "bk", step)

        with torch.no_grad():
            taught = {"projection": target(case["xk"][step])[None]}
        rows = {"projection": online(case["xq"][step])[None]}
        loss = method.loss(rows, taught, unlabelled(case.options["batch"]))["loss"]
        case.check(loss, "loss", step)
        online.zero_grad()
        loss.backward()
        case.check(online.weight.grad, "grad_wq", step)
        case.check(online.bias.grad, "grad_bq", step)

        method.after_step(rows, taught, unlabelled(case.options["batch"]), 0.0)
        n, pointer = case.options["batch"], int(case["ptr"][step])
        case.check(method.queue.rows.T, "queue", step)
        assert method.queue.pointer == pointer
        newest = (pointer - n + torch.arange(n)) % method.queue.size
        case.check(method.queue.rows[newest], "keys", step)


@DTYPES
@pytest.mark.parametrize("name", [
    "supcon__all_labels", "supcon__all_labels_3views", "supcon__all_mask", "supcon__all_unsup", "supcon__one_labels",
    "supcon__one_unsup", "supcon__singletons",
])  # fmt: skip
def test_supcon(golden: Path, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference leaves normalisation to the caller: ours with it for raw rows, and without for unit rows."""
    case = Case(golden, name, dtype)
    o = case.options
    call = functools.partial(
        supcon,
        label=case["labels"] if "labels" in case.arrays else None,
        mask=case["mask"] if "mask" in case.arrays else None,
        temperature=o["temperature"],
        base_temperature=o["base_temperature"],
        anchors=o["contrast_mode"],
    )
    raw = case.leaf("features_raw")
    loss = call(raw.transpose(0, 1))
    case.check(loss, "loss")
    loss.backward()
    case.check(raw.grad, "grad_features_raw")

    if "labels" in case.arrays:
        method = METHODS["supcon"](o["temperature"], o["base_temperature"], o["contrast_mode"])
        rows = {"projection": case["features_raw"].transpose(0, 1)}
        case.check(method.loss(rows, {}, Batch(torch.arange(o["batch"]), case["labels"]))["loss"], "loss")

    monkeypatch.setattr("inbatch.methods.supcon.normalize", lambda rows: rows)
    unit = case.leaf("features")
    loss = call(unit.transpose(0, 1))
    case.check(loss, "loss")
    loss.backward()
    case.check(unit.grad, "grad_features")


def unlabelled(n: int) -> Batch:
    return Batch(torch.arange(n), torch.full((n,), -1))


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def moco(case: Case, queue: Tensor) -> nn.Module:
    """The method with the given queue, (D, K), and its pointer at 0."""
    width, size = queue.shape
    method = METHODS["moco"](case.options["temperature"], size, case.options.get("momentum", 0.999), out=width)
    method.queue = Queue(size, width).to(case.dtype)
    method.queue.rows.copy_(queue.T)
    return method
