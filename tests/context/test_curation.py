"""Batch curation: the published rule against one written out pair by pair, and its effect on a run."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import tiny
from torch import Tensor, nn

from inbatch import api
from inbatch.batch import REPEATED, Batch
from inbatch.context.curation import Curator, pair_distances, violating
from inbatch.errors import ConfigError


def distances(z: Tensor, distance: str) -> tuple[list[float], list[float]]:
    """Compute M_S and M_D of Algorithm 1 pair by pair: the largest own distance, the smallest to another sample."""
    views, n, _ = z.shape

    def far(a: Tensor, b: Tensor) -> float:
        if distance == "euclidean":
            return math.dist(a.tolist(), b.tolist())
        return 1 - float(a @ b) / (float(a.norm()) * float(b.norm()))

    own, near = [], []
    for i in range(n):
        own.append(max(far(z[v, i], z[w, i]) for v in range(views) for w in range(views) if v != w))
        near.append(min(far(z[v, i], z[w, j]) for v in range(views) for w in range(views) for j in range(n) if j != i))
    return own, near


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("views", [2, 3])
def test_distances_pair_by_pair(distance: str, views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inbatch.context.curation._HELD", 3 * 8 * views)
    z = torch.randn(views, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    own, near = distances(z, distance)
    for first in (0, 5):  # a rank's part
        actual = pair_distances(z[:, first : first + 3], z, first, distance)
        for mine, whole in zip(actual, (own, near), strict=True):
            torch.testing.assert_close(mine, torch.tensor(whole[first : first + 3], dtype=torch.float64))


def test_the_two_rules() -> None:
    own, nearest = torch.tensor([0.1, 0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.9, 0.8])
    assert violating(own, nearest, "pairwise").tolist() == [False, True, False, False]  # equal is not smaller
    # The largest own distance is 0.5, the smallest to another sample 0.2.
    assert violating(own, nearest, "strict").tolist() == [True, True, True, True]
    assert violating(own / 10, nearest, "strict").tolist() == [False] * 4
    assert violating(own, nearest, "pairwise", margin=0.2).tolist() == [True, True, False, False]
    assert violating(torch.tensor([0.1, 0.6, 0.1]), torch.tensor([0.9, 0.7, 0.5]), "strict").tolist() == [
        False, True, True,
    ]  # fmt: skip


class Known(nn.Module):
    """Encoder that returns its input."""


def curator(
    answers: dict[int, list[list[float]]], together: bool = False, **options: object
) -> tuple[Curator, list[list[int]]]:
    """Return a curator whose second view of sample i is answers[i][attempt], and the list of the redrawn samples."""
    asked: list[list[int]] = []

    def embed(model: nn.Module, batch: Batch) -> Tensor:
        if batch.attempt is not None:
            asked.append(batch.index.tolist())
        return seen(answers, batch)

    plugin = Curator(**({"distance": "euclidean", "warmup": 0.0, "budget": None} | options))
    plugin.prepare(Known(), embed, 2, together=together)
    return plugin, asked


def seen(answers: dict[int, list[float]], batch: Batch) -> Tensor:
    """Return the rows (V, b, 1) of a batch at its attempts."""
    attempt = [0] * len(batch) if batch.attempt is None else batch.attempt.tolist()
    second = [[answers[i][a]] for i, a in zip(batch.index.tolist(), attempt, strict=True)]
    return torch.stack([batch.index[:, None] * 10.0, torch.tensor(second)])


def drawn(answers: dict[int, list[float]], epoch: int = 1) -> Batch:
    index = torch.arange(len(answers))
    return Batch(index, index * 0 - 1, epoch=epoch)


@pytest.mark.parametrize("budget", [None, 0.5, 1.0])
@pytest.mark.parametrize("rule", ["pairwise", "strict"])
@pytest.mark.parametrize("seed", range(4))
def test_only_violating_samples_are_drawn_again_and_at_most_so_often(
    rule: str, seed: int, budget: float | None
) -> None:
    g = torch.Generator().manual_seed(seed)
    answers = {i: (10.0 * i + 8 * torch.randn(4, generator=g)).tolist() for i in range(6)}
    plugin, asked = curator(answers, rounds=3, rule=rule, budget=budget)
    batch = drawn(answers)
    images = seen(answers, batch)
    views, figures = plugin(batch)

    at, expected, shares = [0] * 6, [], []
    left = 99 if budget is None else int(6 * budget)
    for attempt in range(1, 5):
        second = torch.tensor([[answers[i][at[i]]] for i in range(6)])
        own, near = distances(torch.stack([images[0], second]), "euclidean")
        bad = [i for i in range(6) if own[i] >= (near[i] if rule == "pairwise" else min(near))]
        bad = bad if rule == "pairwise" else sorted({*bad, *(i for i in range(6) if near[i] <= max(own))})
        shares.append(len(bad) / 6)
        if not bad or attempt == 4 or not left:
            break
        bad = sorted(sorted(bad, key=lambda i: near[i] - own[i])[:left])  # the worst first
        left -= len(bad)
        expected.append(bad)
        at = [attempt if i in bad else old for i, old in enumerate(at)]
    assert asked == expected and figures["curate_rounds"] == len(expected) > 0
    assert figures["curate_violating_before"] == shares[0] and figures["curate_violating"] == shares[-1]
    assert figures["curate_redrawn"] == pytest.approx(sum(map(len, expected)) / 6)
    assert torch.equal(seen(answers, views)[1], second), (
        "the step uses the last draw of samples that still violate the rule"
    )
    assert batch.attempt is None, "the batch that came in is not changed"


def test_curation_stops_if_no_sample_violates_the_rule() -> None:
    answers = {0: [0.0], 1: [25.0, 12.0], 2: [20.5]}
    plugin, asked = curator(answers, rounds=9)
    views, figures = plugin(drawn(answers))
    assert figures["curate_rounds"] == len(asked) == 1 and figures["curate_violating"] == 0
    assert 0 < figures["curate_violating_before"] < 1 and seen(answers, views)[1, 1] == 12.0


def test_before_the_warm_up_is_over_nothing_happens() -> None:
    answers = {0: [0.0], 1: [99.0], 2: [20.0]}
    plugin, asked = curator(answers, warmup=0.6)
    assert plugin.starts == 2
    batch = drawn(answers)
    assert plugin(batch) == (batch, {}) and not asked


@pytest.mark.parametrize("model", ["snapshot", "live"])
def test_a_snapshot_is_of_the_end_of_the_previous_epoch(model: str) -> None:
    weights: list[float] = []
    live = nn.Linear(1, 1)

    def embed(model: nn.Linear, batch: Batch) -> Tensor:
        weights.append(float(model.weight))
        return torch.tensor([[[0.0], [10.0]]] * 2)

    plugin = Curator(model=model, distance="euclidean", warmup=0.0)
    plugin.prepare(live, embed, 9)
    batches = [Batch(torch.arange(2), -torch.ones(2), epoch=epoch) for epoch in (1, 1, 2, 2)]
    for step, batch in enumerate(batches):
        live.weight.data.fill_(float(step))
        plugin(batch)
    assert weights == ([0.0, 0.0, 2.0, 2.0] if model == "snapshot" else [0.0, 1.0, 2.0, 3.0])
    assert bool(list(plugin.state_dict())) and ("snapshot.weight" in plugin.state_dict()) == (model == "snapshot")


@pytest.mark.parametrize("together", [False, True])
def test_a_rank_without_violators_takes_as_many_rounds(together: bool) -> None:
    """All violators are in the other rank's half: this rank joins every collective and redraws nothing.

    With a model that is divided over ranks it embeds as many samples as the other one, without any effect.
    """
    answers = {0: [0.0], 1: [10.0], 2: [20.0], 3: [30.0]}
    plugin, asked = curator(answers, together, rounds=2)
    other = torch.tensor([[[500.0], [600.0]], [[800.0], [900.0]]])  # views x samples: far apart, and close together
    calls = []

    def gather(x: Tensor, dim: int) -> Tensor:
        calls.append(dim)
        if x.ndim == 3:
            return torch.cat([x, other], dim=1)
        return torch.cat([x, x.new_tensor([500.0, 500.0] if len(calls) % 3 == 2 else [1.0, 1.0])])

    views, figures = plugin(drawn(answers).take(slice(2)), gather, 0)
    assert asked == [[0, 0]] * 2 * together and figures["curate_rounds"] == 2 and len(calls) == 9
    assert figures["curate_violating"] == 0.5 and views.attempt.tolist() == [0, 0]


def test_redraws_count_from_the_first_draw_and_need_whole_images() -> None:
    """A sampler that repeats an image gives each occurrence a draw of its own."""
    first = REPEATED * torch.tensor([0, 3])
    plugin, _ = curator({}, rounds=2)
    plugin._embed = lambda model, batch: torch.tensor([0.0, 5.0])[:, None, None].repeat(1, len(batch), 1)
    views, figures = plugin(replace(drawn({0: [], 1: []}), attempt=first))
    assert figures["curate_rounds"] == 2 and views.attempt.tolist() == (first + 2).tolist()
    with pytest.raises(ConfigError, match="cache_on_device"):
        plugin(replace(drawn({0: [], 1: []}), crops=(torch.zeros(2, 3, 4, 4, dtype=torch.uint8),), images=None))


def test_rows_do_not_depend_on_the_batch() -> None:
    """Curation uses evaluation mode: the embedding of a sample does not depend on the other samples."""
    built = api.prepare(
        "digits-canvas", subset=80, batch_size=16, epochs=2, settings={"curate.name": "redraw"}, fuse="set"
    )
    plugin, batch = built.step.curator, next(iter(built.loader.epoch(1)))
    whole = plugin._embed(plugin.snapshot, batch)
    alone = plugin._embed(plugin.snapshot, batch.take(slice(3, 4)))
    torch.testing.assert_close(whole[:, 3:4], alone)
    assert built.network.training, "the network is back in training mode"


@pytest.mark.parametrize("model", ["snapshot", "live"])
def test_rows_are_of_images_of_the_size_trained_on(model: str) -> None:
    """While images are small, distances are those of small images, which the loss compares."""
    settings = {"curate.name": "redraw", "curate.model": model, "grow_from": 0.5, "grow_until": 0.5}
    built = api.prepare("digits-canvas", subset=80, batch_size=16, epochs=4, settings=settings)
    plugin, batch, sides = built.step.curator, next(iter(built.loader.epoch(1))), []
    plugin(batch)  # makes the snapshot
    embedding = plugin.snapshot if model == "snapshot" else built.network
    embedding.encoder.register_forward_pre_hook(lambda module, inputs: sides.append(inputs[0].shape[-1]))
    for step in (built.loader.steps, 3 * built.loader.steps):
        built.step.resize(step)
        plugin._embed(embedding, batch)
    full = built.recipe.image_size
    assert sides == [full // 2] * 2 + [full] * 2, "two views each"


@pytest.mark.parametrize("crops", ["default", "intersection"])
def test_redrawing_is_repeatable_and_independent(crops: str) -> None:
    built = api.prepare(
        "digits-canvas-colour", subset=80, batch_size=16, epochs=2, crops=crops,
        settings={"curate.name": "redraw", "views.name": "simclr_cifar"},
    )  # fmt: skip
    batch = next(iter(built.loader.epoch(1)))
    chosen = torch.tensor([2, 7])
    tries = replace(batch, attempt=torch.arange(16) % 3)  # different samples
    mixed = built.views(tries).images
    whole, first, again, other = (
        built.views(replace(batch, attempt=torch.full((16,), n)).take(places)).images
        for n, places in ((1, slice(16)), (1, chosen), (1, chosen), (2, chosen))
    )
    for view in range(2):
        assert torch.equal(first[view], again[view]) and not torch.equal(first[view], other[view])
        torch.testing.assert_close(first[view], whole[view][chosen])
        assert not torch.allclose(first[view], built.views(batch).images[view][chosen])
        torch.testing.assert_close(mixed[view][[1, 7]], whole[view][[1, 7]])
        torch.testing.assert_close(mixed[view][::3], built.views(batch).images[view][::3])


@pytest.mark.slow
def test_a_run_logs_and_draws_what_curation_did(tmp_path: Path) -> None:
    settings = {"curate.name": "redraw", "curate.rule": "strict", "curate.rounds": 2}
    run = tiny("simclr", tmp_path, settings=settings)
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    last = next(record for record in log if record["step"] == 10 and "curate_rounds" in record)
    assert 1 <= last["curate_rounds"] <= 2 and 0 < last["curate_violating_before"] <= 1
    assert {"curate_redrawn", "curate_violating"} <= last.keys()
    assert not any("curate_rounds" in record for record in log if record["step"] <= 5), "a warm-up of one epoch"
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert run.recipe.curate.options["rule"] == "strict"


def photos(folder: Path, count: int = 48) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        (folder / str(i % 3)).mkdir(parents=True, exist_ok=True)
        shape = (40 + i % 5, 50, 3)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / str(i % 3) / f"{i}.png")
    return folder


def test_streamed_data_are_curated_as_resident_ones(tmp_path: Path) -> None:
    """With streaming and curation whole canvases are passed: the same views, redrawn in the same way."""
    data = photos(tmp_path / "photos")
    settings = {"curate.name": "redraw", "encoder.name": "tiny", "cache_on_device": None, "curate.rounds": 2}
    options = {
        "image_size": 32,
        "batch_size": 16,
        "epochs": 2,
        "settings": settings,
        "workers": 2,
        "precision": "float32",
    }
    resident = api.prepare(
        str(data), cache_on_device=True, **(options | {"settings": settings | {"cache_on_device": True}})
    )
    streamed = api.prepare(
        str(data), cache_on_device=False, **(options | {"settings": settings | {"cache_on_device": False}})
    )
    assert resident.loader.held is not None and streamed.loader.held is None
    for one, other in itertools.islice(zip(resident.loader.epoch(1), streamed.loader.epoch(1), strict=True), 2):
        assert torch.equal(one.index, other.index) and torch.equal(one.size, other.size)
        for attempt in (torch.zeros(16, dtype=torch.long), torch.arange(16) % 2):
            pair = (replace(batch, attempt=attempt) for batch in (one, other))
            drawn = (built.views(batch).images for built, batch in zip((resident, streamed), pair, strict=True))
            for a, b in zip(*drawn, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert torch.isfinite(torch.as_tensor(streamed.step(other, 3)["curate_violating"]))


def test_invalid_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"curate\.warmup"):
        Curator(warmup=1.0)
    with pytest.raises(ConfigError, match=r"curate\.budget = 0"):
        Curator(budget=0.0)
    with pytest.raises(ConfigError, match=r"has no projection: set curate\.where=features"):
        api.prepare(
            "digits-canvas", "supervised", subset=80, batch_size=16,
            settings={"curate.name": "redraw", "curate.where": "projection"},
        )  # fmt: skip


@pytest.mark.parametrize(("length", "first"), [({"epochs": 40}, 4), ({"steps": 100}, 2), ({"steps": 48}, 1)])
def test_the_warm_up_is_a_share_of_a_run_whose_length_is_in_steps(length: dict[str, int], first: int) -> None:
    """Epochs of 5 steps: the preset's number of epochs does not count if the length is in steps."""
    settings = {"curate.name": "redraw", "epochs": 400} | length
    built = api.prepare("digits-canvas", subset=80, batch_size=16, settings=settings)
    assert built.loader.steps == 5 and built.step.curator is not None and built.step.curator.starts == first
