"""Losses, memory bank, evaluation, LARS and schedules against vectors that the authors' code computed."""

import functools
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_vectors import DTYPES, Case, manifest, unlabelled
from torch import Tensor, nn

from inbatch.batch import Batch
from inbatch.evaluation import Embeddings, ari, hungarian_accuracy, knn, knn_scores, nmi
from inbatch.losses import info_nce, nt_xent, supcon
from inbatch.methods import METHODS
from inbatch.models.network import ema_update
from inbatch.nn import schedules as s
from inbatch.nn.functional import logsumexp_rows
from inbatch.nn.memory_bank import MemoryBank
from inbatch.training import optim


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
    assert k.grad is None  # a constant in the reference

    # The two log-sum-exps of the equation equal the reference's matrix of logits.
    logits = case["logits"]
    unit = torch.nn.functional.normalize(q.detach(), dim=1)
    positive = (unit * torch.nn.functional.normalize(k.detach(), dim=1)).sum(1) / t
    torch.testing.assert_close(positive, logits[:, 0], **case.tolerance)
    torch.testing.assert_close(logsumexp_rows(unit, queue, t), logits[:, 1:].logsumexp(1), **case.tolerance)

    # The same through the method, whose queue receives this step's keys only after the loss.
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

    The authors update the key encoder before it encodes, inbatch after the optimiser step; both give the same result,
    because the end of one step is the start of the next.
    """
    case = Case(golden, "moco_steps__1", dtype)
    online, target = linear(case["wq"][0], case["bq"][0]), linear(case["wk0"], case["bk0"])
    method = moco(case, case["queue0"])
    for step in range(case.options["steps"]):
        online.load_state_dict({"weight": case["wq"][step], "bias": case["bq"][step]})
        ema_update(target, online, method.target_momentum(step / case.options["steps"]))
        case.check(target.weight, "wk", step)
        case.check(target.bias, "bk", step)

        with torch.no_grad():
            target_rows = {"projection": target(case["xk"][step])[None]}
        rows = {"projection": online(case["xq"][step])[None]}
        loss = method.loss(rows, target_rows, unlabelled(case.options["batch"]))["loss"]
        case.check(loss, "loss", step)
        online.zero_grad()
        loss.backward()
        case.check(online.weight.grad, "grad_wq", step)
        case.check(online.bias.grad, "grad_bq", step)

        method.after_step(rows, target_rows, unlabelled(case.options["batch"]), 0.0)
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
    """The reference does not normalise: inbatch does so for raw rows, and not for unit rows."""
    case = Case(golden, name, dtype)
    o = case.options
    call = functools.partial(
        supcon,
        label=case["labels"] if "labels" in case.arrays else None,
        mask=case["mask"] if "mask" in case.arrays else None,
        temperature=o["temperature"],
        base_temperature=o["base_temperature"],
        contrast_mode=o["contrast_mode"],
    )
    raw = case.leaf("features_raw")
    loss = call(raw.transpose(0, 1))
    case.check(loss, "loss")
    loss.backward()
    case.check(raw.grad, "grad_features_raw")

    if "labels" in case.arrays:
        method = METHODS["supcon"](o["temperature"], o["base_temperature"], contrast_mode=o["contrast_mode"])
        rows = {"projection": case["features_raw"].transpose(0, 1)}
        case.check(method.loss(rows, {}, Batch(torch.arange(o["batch"]), case["labels"]))["loss"], "loss")

    monkeypatch.setattr("inbatch.methods.supcon.normalize", lambda rows: rows)
    unit = case.leaf("features")
    loss = call(unit.transpose(0, 1))
    case.check(loss, "loss")
    loss.backward()
    case.check(unit.grad, "grad_features")


def embeddings(vectors: Tensor, labels: Tensor) -> Embeddings:
    return Embeddings(vectors.float(), labels, tuple(map(str, range(len(labels)))), "golden", "vectors")


@DTYPES
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("name", ["knn__1", "knn__2", "knn__3"])
def test_knn(golden: Path, name: str, chunk: int | None, dtype: torch.dtype) -> None:
    case = Case(golden, name, dtype)
    o = case.options
    options = {"k": o["k"], "temperature": o["temperature"]}
    bank, query, labels = case["bank_raw"], case["query_raw"], case["query_labels"]
    scores = knn_scores(query, bank, case["bank_labels"], o["classes"], **options, chunk=chunk)
    case.check(scores.exp(), "class_scores")
    assert torch.equal(scores.argmax(1), case["pred"])
    result = knn(embeddings(bank, case["bank_labels"]), embeddings(query, labels), **options)
    assert result["top1"] == pytest.approx(case.arrays["top1"].item(), abs=1e-12)
    five = case["ranking"][:, :5]
    scored = case["class_scores"].gather(1, five) > 0  # a class without a vote is not a hit
    hit = ((five == labels[:, None]) & scored).any(1)
    assert result["top5"] == pytest.approx(hit.double().mean().item(), abs=1e-12)


@DTYPES
def test_knn_euclid(golden: Path, dtype: torch.dtype) -> None:
    case = Case(golden, "knn_euclid__1", dtype)
    options = {"k": case.options["k"], "distance": "euclidean"}
    bank, query, labels = case["bank"], case["query"], case["bank_labels"]
    scores = knn_scores(query, bank, labels, case.options["classes"], **options)
    assert torch.equal(scores.argmax(1), case["pred"])
    assert torch.equal(scores.exp().sum(1).round(decimals=9), torch.full((len(query),), 5.0, dtype=torch.float64))
    right = case["pred"] == case["query_labels"]
    assert right.double().mean().item() == pytest.approx(case.arrays["accuracy"].item(), abs=1e-11)
    # The reference resolves ties to the smallest class; here the tied classes share the hit.
    tied = (scores - scores.amax(1, keepdim=True)).abs() < 1e-12
    shared = (tied.gather(1, case["query_labels"][:, None])[:, 0] / tied.sum(1)).double()
    assert torch.equal(shared[tied.sum(1) == 1], right[tied.sum(1) == 1].double()) and (tied.sum(1) > 1).sum() == 2
    result = knn(embeddings(bank, labels), embeddings(query, case["query_labels"]), **options)
    assert result["top1"] == pytest.approx(shared.mean().item(), abs=1e-11)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_cluster_metrics(golden: Path, number: int) -> None:
    case = Case(golden, f"cluster_metrics__{number}")
    for name, measure in (("nmi", nmi), ("acc", hungarian_accuracy), ("ari", ari)):
        case.check(torch.tensor(measure(case["labels"], case["pred"]), dtype=torch.float64), name)


def test_schedules(golden: Path) -> None:
    case = Case(golden, "schedules__1")
    h = case.options
    base, batch, epochs, spe = h["base_lr"], h["batch"], h["epochs"], h["steps_per_epoch"]
    warm_epochs, total = h["warmup_epochs"], h["total_steps"]
    warm = warm_epochs * spe
    linear, sqrt = (optim.scaled_lr(base, batch, rule) for rule in ("linear", "sqrt"))
    steps, long = range(total), range((epochs + 10) * spe)

    def barlow(base):
        peak = optim.scaled_lr(base, batch, "linear")
        return [s.warmup_cosine(i, len(long), 10 * spe, peak, 0.001 * peak) for i in long]

    def ema(base, ends="start"):
        return [s.cosine(s.progress(i, total, ends), base, 1.0) for i in steps]

    def supcon(step):
        floor = base * 0.1**3
        if step < warm:
            return s.linear(s.progress(step, warm), 0.01, s.cosine(warm_epochs / epochs, base, floor))
        return s.cosine((step // spe + 1) / epochs, base, floor)

    ours = {
        # MoCo v3 counts in fractions of an epoch.
        "moco_v3_lr": [s.warmup_cosine(i / spe, epochs, warm_epochs, base) for i in steps],
        "moco_v3_momentum": ema(0.99),
        "moco_v12_cos_lr": [s.cosine(s.progress(e, epochs), base, 0.0) for e in range(epochs)],
        "moco_v12_step_lr": [s.step_decay(e, base, (epochs // 2, epochs * 3 // 4)) for e in range(epochs)],
        "barlow_lr": np.stack([barlow(0.2), barlow(0.0048)], 1),
        "vicreg_lr": barlow(0.2),
        "dino_lr": [s.warmup_cosine(i, total, warm, base, 1e-6, ramp="both") for i in steps],
        "dino_momentum": ema(0.996),
        "swav_lr": [s.warmup_cosine(i, total, warm, base, 0.0006, ramp="both") for i in steps],
        "byol_lr": [s.warmup_cosine(i, total, warm, linear) for i in steps],
        "byol_ema": ema(0.99),
        "simclr_linear_lr": [s.warmup_cosine(i, total + 1, warm, linear) for i in range(total + 1)],
        "simclr_sqrt_lr": [s.warmup_cosine(i, total + 1, warm, sqrt) for i in range(total + 1)],
        "supcon_warm_cos_lr": [supcon(i) for i in steps],
        "simsiam_lr": [[s.cosine(s.progress(e, epochs), linear, 0.0), linear] for e in range(epochs)],
        "lightly_factor": [s.warmup_cosine(i, total, warm, 1.0, ramp="end", decay="both") for i in steps],
        "lightly_momentum": ema(0.996, "both"),
        "solo_lr": [s.warmup_cosine(i, total, warm, base, start=3e-5, ramp="both") for i in steps],
    }
    assert set(ours) == set(case.arrays)
    for name, values in ours.items():
        single = name in ("byol_lr", "simclr_linear_lr", "simclr_sqrt_lr")
        tolerance = case.tolerances["float32" if single else "float64"]
        np.testing.assert_allclose(np.asarray(values), case.arrays[name], **tolerance, err_msg=name)


@DTYPES
@pytest.mark.parametrize("form", ["p", "p_simclr_tf"])
def test_lars(golden: Path, form: str, dtype: torch.dtype) -> None:
    """Three steps; SimCLR's TensorFlow code ran in single precision."""
    case = Case(golden, "lars__1", dtype)
    names = [key.removeprefix("p0_") for key in case.arrays if key.startswith("p0_")]
    params = {n: nn.Parameter(case[f"p0_{n}"].clone()) for n in names}
    h = case.options
    optimizer = optim.LARS(
        params.values(), lr=math.nan, momentum=h["momentum"], weight_decay=h["weight_decay"],
        eta=h["trust_coefficient"], lr_in_buffer=form == "p_simclr_tf",
    )  # fmt: skip
    if form == "p_simclr_tf":
        case.tolerance = case.tolerances["float32"]
    for step, lr in enumerate(h["lrs"]):
        optimizer.param_groups[0]["lr"] = lr
        for n, p in params.items():
            p.grad = case[f"grad_{n}"][step]
        optimizer.step()
        for n, p in params.items():
            case.check(p, f"{form}_{n}", step)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def moco(case: Case, queue: Tensor) -> nn.Module:
    """Return the method with the given queue, (D, K), and its pointer at 0."""
    width, size = queue.shape
    method = METHODS["moco"](case.options["temperature"], size, case.options.get("momentum", 0.999), out_dim=width)
    method.queue = MemoryBank(size, width).to(case.dtype)
    method.queue.rows.copy_(queue.T)
    return method
