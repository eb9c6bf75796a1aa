"""Collapse is detected in methods with a part removed, and not in the same methods unchanged."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inbatch
from inbatch.api import prepare
from inbatch.batch import Batch
from inbatch.data.views import Views, make_views
from inbatch.evaluation import lidar, rankme
from inbatch.models.network import Network
from inbatch.nn.heads import Head, mlp
from inbatch.training.build import RunComponents
from inbatch.training.monitors import label_free, online_evaluation
from inbatch.training.monitors.collapse import output_diversity, signs
from inbatch.training.monitors.online_evaluation import OnlineEvaluator, make_online_evaluator

BROKEN = {
    "byol without predictor": ("byol", {"method.predictor": False, "method.norm": False}),
    "byol without predictor and momentum": (
        "byol",
        {"method.predictor": False, "method.norm": False, "method.momentum": 0.0},
    ),
    # Three times the preset's learning rate: with the preset's, crossing the threshold within 8 epochs depends on the
    # seed (2 of 3).
    "simsiam without stop-gradient": ("simsiam", {"method.stop_gradient": False, "optimizer.lr": 0.006}),
    "vicreg without variance": ("vicreg", {"method.std_coeff": 0.0}),
}
EPOCHS = 8


def run(method: str, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    return inbatch.pretrain(
        "digits-canvas", method, out=out, settings=settings, epochs=EPOCHS, evaluate_every=EPOCHS, seed=0,
        precision="float32",
    ).result  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_broken_runs_are_reported_as_collapsed(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    method, settings = BROKEN[name]
    result = run(method, settings, tmp_path)
    lines = [line for line in capfd.readouterr().err.splitlines() if "collapse:" in line]
    measures = ("standard deviation per dimension", "effective rank (RankMe)")
    assert any("rows of projection" in line and any(measure in line for measure in measures) for line in lines), lines
    assert lines[0].startswith("epoch ") and "optimizer.lr" in lines[0]
    assert any("projection" in sentence for sentence in result["collapsed"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["byol", "simsiam", "vicreg"])
def test_intact_runs_are_not_reported_as_collapsed(
    method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = run(method, {}, tmp_path)
    assert result["collapsed"] == [] and "collapse" not in capfd.readouterr().err
    watched = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    watched = [line for line in watched if "projection_rank" in line]
    assert len(watched) == EPOCHS + 1 and all(line["features_rank"] > 1 for line in watched)


def test_spread_of_equal_and_of_different_outputs() -> None:
    """Equal images have rank 1 and no spread; measured for the encoder and every direct head, not for predictors."""
    heads = {"projection": Head(mlp(12, 8, norm=False)), "prediction": Head(mlp(8, 8, norm=False), "projection")}
    network = Network(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12)), heads, ["prediction"])
    before = {key: value.clone() for key, value in network.state_dict().items()}
    images = torch.randn(64, 3, 2, 2)
    different, same = output_diversity(network, images), output_diversity(network, images[:1].expand(64, 3, 2, 2))
    assert set(different) == {"features_std", "features_rank", "projection_std", "projection_rank"}
    assert different["features_std"] > 0.9 and different["features_rank"] > 11
    assert same["projection_std"] < 1e-5 and same["projection_rank"] == pytest.approx(1, abs=1e-3)
    assert network.training and all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_signs() -> None:
    most = {"features_std": 0.4, "features_rank": 20.0, "projection_std": 0.9, "projection_rank": 40.0}
    fine = {"features_std": 0.15, "features_rank": 9.0, "projection_std": 0.5, "projection_rank": 10.0}
    assert signs(fine, most) == {}
    assert set(signs({**fine, "projection_rank": 7.0}, most)) == {"projection_rank"}
    assert signs({**fine, "projection_rank": 7.0}, most, classes=True) == {}
    assert set(signs({**fine, "projection_std": float("nan"), "features_rank": 4.0}, most)) == {
        "projection_std",
        "features_rank",
    }


# Measures without labels at every online evaluation


def evaluator() -> tuple[RunComponents, OnlineEvaluator]:
    built = prepare("digits-canvas", "simclr", subset=40, batch_size=20, encoder="tiny", device="cpu")
    return built, make_online_evaluator(built, None)


def test_an_online_evaluation_measures_views_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """LiDAR is of `LIDAR_VIEWS` keyed views of `LIDAR_IMAGES` images; weights, buffers and random state stay."""
    monkeypatch.setattr(label_free, "LIDAR_IMAGES", 12)
    monkeypatch.setattr(label_free, "LIDAR_VIEWS", 5)
    built, evaluate = evaluator()
    state = {key: value.clone() for key, value in built.network.state_dict().items()}
    random, mode = torch.get_rng_state(), built.network.training
    first = evaluate()
    assert set(first) == {"feature_std", "rankme", "alpha", "sigreg_distance", "lidar"} and evaluate() == first
    assert torch.equal(torch.get_rng_state(), random) and built.network.training == mode
    assert all(torch.equal(value, state[key]) for key, value in built.network.state_dict().items())

    chosen = label_free.Chosen(built.loader.source, built.loader.held, built.recipe.seed)
    options: dict[str, Any] = {"precision": built.network.precision}
    viewed = label_free.embed_views({"it": built.encoder}, built.views, chosen, built.recipe.seed, **options)["it"]
    assert viewed.shape == (12, 5, 96) and first["lidar"] == float(lidar(viewed))
    other = label_free.embed_views({"it": built.encoder}, built.views, chosen, 1, **options)["it"]
    assert not torch.equal(viewed, other)  # keyed by the seed
    assert len({tuple(row.tolist()) for row in viewed.flatten(0, 1)}) == 60  # no view is drawn twice


def test_images_from_everywhere_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source can be sorted, such as by folder, so that its first images are of one kind."""
    monkeypatch.setattr(online_evaluation, "MEASURED", 8)
    embedded, embed = list[Any](), online_evaluation.embed
    monkeypatch.setattr(online_evaluation, "embed", lambda *args, **kw: embedded.append(args[1]) or embed(*args, **kw))
    built, evaluate = evaluator()
    evaluate()
    numbers = embedded[0].source.indices
    assert len(numbers) == 8 and numbers.max() > len(built.loader.source) // 2
    rows = torch.cat([torch.zeros(8, 3), torch.randn(8, 3)])
    measures = online_evaluation._feature_measures(built.encoder, rows)
    assert measures["rankme"] == float(rankme(rows[torch.linspace(0, 15, 8).long()]))


def test_views_for_lidar_have_the_size_of_the_first() -> None:
    large, small = (make_views("digits", {"size": size}, 1)[:1] for size in (20, 12))
    views = Views([*large, *large, *small, *small], [0.5], [0.5])
    batch = Batch(torch.arange(3), torch.zeros(3).long(), images=torch.randint(0, 255, (3, 1, 40, 40)).byte())
    drawn = label_free.several_views(views, batch, 5)
    assert [x.shape[-1] for x in drawn] == [20] * 5 and not torch.equal(drawn[0], drawn[2])
    for number, alone in enumerate((0, 0, 2, 2, 4)):  # two of a call are of the size: those of epochs 0, 2 and 4
        assert torch.equal(drawn[number], views(replace(batch, epoch=alone)).images[number % 2])


def test_lidar_of_too_few_images_is_undefined() -> None:
    assert all(map(math.isnan, (label_free.lidar_of(None), label_free.lidar_of(torch.ones(1, 5, 3)))))
