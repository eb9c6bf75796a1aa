"""LARS and the schedules against vectors computed by the authors' own code."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from inbatch import optim
from inbatch import schedules as s

GOLDEN = Path(os.environ.get("INBATCH_GOLDEN", Path(__file__).parent / "golden"))


def case(name):
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    entry = next(c for c in manifest["cases"] if c["id"] == name)
    return np.load(GOLDEN / entry["file"], allow_pickle=False), entry


def test_schedules():
    arrays, entry = case("schedules__1")
    h = entry["hyperparameters"]
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
    assert set(ours) == set(arrays.files)
    for name, values in ours.items():
        single = name in ("byol_lr", "simclr_linear_lr", "simclr_sqrt_lr")
        tolerance = entry["suggested_tolerance"]["float32" if single else "float64"]
        np.testing.assert_allclose(np.asarray(values), arrays[name], **tolerance, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["p", "p_simclr_tf"])
def test_lars(form, dtype):
    arrays, entry = case("lars__1")
    names = [key.removeprefix("p0_") for key in arrays.files if key.startswith("p0_")]
    params = {n: torch.nn.Parameter(torch.tensor(arrays[f"p0_{n}"], dtype=dtype)) for n in names}
    h = entry["hyperparameters"]
    optimizer = optim.LARS(
        params.values(),
        lr=math.nan,
        momentum=h["momentum"],
        weight_decay=h["weight_decay"],
        eta=h["trust_coefficient"],
        lr_in_buffer=form == "p_simclr_tf",
    )
    exact = dtype == torch.float64 and form == "p"
    tolerance = entry["suggested_tolerance"]["float64" if exact else "float32"]
    for step, lr in enumerate(h["lrs"]):
        optimizer.param_groups[0]["lr"] = lr
        for n, p in params.items():
            p.grad = torch.tensor(arrays[f"grad_{n}"][step], dtype=dtype)
        optimizer.step()
        for n, p in params.items():
            np.testing.assert_allclose(
                p.detach().numpy(), arrays[f"{form}_{n}"][step], **tolerance, err_msg=f"{n}, step {step}"
            )
