"""Comparison of the trained with the untrained encoder: with and without labels, in every run and in `evaluate`."""

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from conftest import SHARED
from PIL import Image
from small_runs import assert_same_state, stop_after, tiny
from torch.nn import functional as F

import inbatch
from inbatch.data import decode_all, open_data, write_folder
from inbatch.data.views import Views, make_views
from inbatch.errors import ConfigError, DataError, Preempted
from inbatch.models import create_encoder
from inbatch.runtime import distributed
from inbatch.training import run_evaluation, run_result
from inbatch.training.monitors import label_free, neighbour_grid
from inbatch.training.monitors.neighbour_grid import save_neighbour_grid

MEASURES = {"same_image": "higher", "rankme": "higher", "lidar": "higher", "alpha": "near 1",
            "sigreg_distance": "lower", "feature_std": "higher", "uniformity": "lower",
            "alignment": "lower"}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def uncurved() -> Iterator[None]:
    """Leave out the picture of the curves, which no test here looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_result, "plot_curves", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write forty unlabelled images of two sizes to a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("data") / "my photos"
    folder.mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 24, 30, 3), dtype=np.uint8)):
        Image.fromarray(pixels[:, : 24 + 6 * (i % 2)]).save(folder / f"{i}.png")
    return folder


def learn(photos: Path, out: Path, **fields: Any) -> inbatch.Run:
    defaults: dict[str, Any] = {"encoder": "tiny", "batch_size": 10, "epochs": 2, "quiet": True, "image_size": 24}
    return inbatch.pretrain(photos, out=out, **defaults | fields)


@pytest.fixture(scope="module")
def learned(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> inbatch.Run:
    return learn(photos, tmp_path_factory.mktemp("my runs") / "a run")


def words(path: Path) -> str:
    return shlex.quote(str(path))


# Measures


def test_measures_literally() -> None:
    first, second = (F.normalize(torch.randn(9, 5), dim=1) for _ in range(2))
    pairs = [(i, j) for i in range(9) for j in range(i)]
    potential = [float(torch.exp(-2 * ((first[i] - first[j]) ** 2).sum())) for i, j in pairs]
    assert label_free.uniformity(first) == pytest.approx(np.log(np.mean(potential)), abs=1e-5)
    apart = [float(((first[i] - second[i]) ** 2).sum()) for i in range(9)]
    assert label_free.alignment(first, second) == pytest.approx(np.mean(apart), abs=1e-5)
    hits = [max(range(9), key=lambda j, i=i: float(first[i] @ second[j])) == i for i in range(9)]
    assert label_free.same_image(first, second) == pytest.approx(np.mean(hits))
    assert label_free.same_image(first, first) == 1 and label_free.alignment(first, first) == 0


def test_collapse_is_visible_in_every_measure_except_alignment() -> None:
    same = torch.ones(50, 8)
    measures = label_free.measures(label_free.Embedded(same, same, same, torch.arange(50)))
    assert measures["same_image"] == pytest.approx(1 / 50) and measures["rankme"] == pytest.approx(1, abs=0.01)
    assert measures["uniformity"] == pytest.approx(0, abs=1e-6)
    assert measures["feature_std"] == pytest.approx(0, abs=1e-5)
    assert measures["alignment"] == 0


def test_one_view_is_drawn_twice() -> None:
    source = open_data((torch.randint(0, 255, (12, 1, 20, 20), dtype=torch.uint8), [0] * 12))
    encoder = create_encoder("tiny", size=20, channels=1).eval()
    one = Views(make_views("digits", {"size": 20}, 1)[:1], encoder.mean, encoder.std)
    embedded = label_free.embed_all({"it": encoder}, one, label_free.Chosen(source, None, 0), 0)["it"]
    assert embedded.first.shape == embedded.second.shape == (12, 96)
    assert not torch.allclose(embedded.first, embedded.second)


def test_views_are_the_same_whenever_unreadable_images_are_found(tmp_path: Path) -> None:
    """A run leaves them out at its start, `inbatch evaluate` finds them when it decodes the sample."""
    folder = write_folder(open_data("digits-canvas-colour", subset=60), tmp_path / "images")
    source = open_data(folder)
    for i in (0, 7, 31, 58):
        (folder / source.identity(i)).write_bytes(b"")
    left = decode_all(source, max_bad=0.5).source
    encoder = create_encoder("tiny", size=20).eval()
    views = Views(make_views("digits", {"size": 20}, 3), encoder.mean, encoder.std)
    for most in (60, 24):
        now, before = (
            label_free.embed_all({"it": encoder}, views, label_free.Chosen(one, None, 0, most), 0)["it"]
            for one in (source, left)
        )
        assert len(before.clean) < most
        for name in ("clean", "first", "second", "viewed"):
            torch.testing.assert_close(getattr(now, name), getattr(before, name), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_whitened_features_are_measured_before_they_are() -> None:
    """Whitening gives every encoder the same rank and spread; only the returned features are whitened."""
    source = open_data(torch.randint(0, 255, (40, 3, 32, 32), dtype=torch.uint8))
    encoder = create_encoder("fast", size=32, whiten=True).eval()
    views = Views(make_views("simclr_cifar", {"size": 32}, 3), encoder.mean, encoder.std)
    chosen = label_free.Chosen(source, None, 0)
    plain = label_free.embed_all({"it": encoder}, views, chosen, 0)["it"]
    expected = label_free.measures(plain)
    assert encoder.readout is not None and plain.neighbour_rows(plain.clean) is plain.clean
    encoder.readout.fit(plain.clean)
    embedded = label_free.embed_all({"it": encoder}, views, chosen, 0)["it"]
    assert int(encoder.readout.images) == 40
    assert torch.equal(embedded.clean, plain.clean)
    whitened = encoder.embed([source.image(int(i)) for i in chosen.indices])
    np.testing.assert_allclose(embedded.neighbour_rows(embedded.clean), whitened, rtol=1e-3, atol=1e-3)
    del expected["same_image"]
    assert label_free.measures(embedded) | expected == label_free.measures(embedded)


# Runs without labels


def test_a_run_without_labels_shows_whether_it_learned(learned: inbatch.Run, photos: Path) -> None:
    measures = learned.result["unlabelled"]
    assert {name: measure["better"] for name, measure in measures.items()} == MEASURES
    for measure in measures.values():
        assert measure["untrained"] != measure["trained"] and "image" in measure["what"]
    assert measures["rankme"]["trained"] <= 40 and "40 images, at most 96" in measures["rankme"]["what"]
    assert 1 / 40 <= measures["same_image"]["trained"] <= 1
    assert learned.result["untrained"] is None and learned.result["initial"] == "untrained encoder"
    assert learned.result["comparison_seconds"] > 0
    width, height = Image.open(learned.directory / "neighbours.png").size
    assert width > 11 * neighbour_grid.SIDE and height > 8 * neighbour_grid.SIDE
    assert json.loads((learned.directory / "result.json").read_text())["unlabelled"] == measures


@pytest.mark.slow
def test_pretrain_prints_it(photos: Path, tmp_path: Path) -> None:
    line = f"pretrain --data {words(photos)} --encoder tiny --epochs 1 --batch 10 --set image_size=24"
    result = run(f"{line} --out {words(tmp_path / 'a run')}")
    assert result.exit_code == 0
    picture = tmp_path / "a run" / "neighbours.png"
    assert f"Neighbours: {picture} (left: before training, right: after)" in result.stdout
    for row in ("same image found", "RankMe", "feature std", "uniformity", "alignment"):
        assert row in result.stdout
    assert "untrained encoder" in result.stdout and "higher" in result.stdout and "No labels" in result.stdout
    assert "Compared with the encoder before training in " in result.stderr


@pytest.mark.slow
def test_a_resumed_run_shows_the_same(learned: inbatch.Run, photos: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 3)
        learn(photos, tmp_path / "run")
    resumed = learn(photos, tmp_path / "run", resume=True)
    assert resumed.result["unlabelled"] == learned.result["unlabelled"]
    pictures = [np.asarray(Image.open(one / "neighbours.png")) for one in (learned.directory, tmp_path / "run")]
    np.testing.assert_array_equal(*pictures)


@pytest.mark.slow
def test_streamed_images_give_the_same_figures_as_held_ones(photos: Path, tmp_path: Path) -> None:
    measures = [
        learn(photos, tmp_path / str(held), cache_on_device=held, workers=0, epochs=1).result["unlabelled"]
        for held in (True, False)
    ]
    for name in MEASURES:
        assert measures[0][name]["untrained"] == pytest.approx(measures[1][name]["untrained"], rel=1e-4)


@pytest.mark.slow
def test_images_that_cannot_be_read_are_left_out(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(label_free, "_CHUNK", 2)  # one chunk is damaged completely
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    bad = sorted(folder.iterdir())[::4]
    for file in bad:
        file.write_bytes(b"no image")
    result = learn(folder, tmp_path / "run", cache_on_device=False, workers=0, max_unreadable=0.9).result
    assert f"{40 - len(bad)} images" in result["unlabelled"]["rankme"]["what"]
    assert (tmp_path / "run" / "neighbours.png").is_file()
    gone = open_data(folder)
    gone = inbatch.data.Subset(
        gone, torch.tensor([i for i in range(40) if gone.identity(i) in {b.name for b in bad}]), ""
    )
    encoder = create_encoder("tiny", size=24)
    views = Views(make_views("simclr_cifar", {"size": 24}, 3), encoder.mean, encoder.std)
    with pytest.raises(DataError, match="0 images that can be read"):
        label_free.embed_all({"it": encoder}, views, label_free.Chosen(gone, None, 0), 0)


def test_neighbour_grid_shows_both_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row: the query, its neighbours before and after; frames mark right and wrong only if there are labels."""
    source = open_data((torch.randint(0, 100, (30, 3, 12, 10), dtype=torch.uint8), torch.arange(30) % 3))
    before, after = torch.randn(30, 5), torch.eye(3)[source.labels] + 0.01 * torch.randn(30, 3)
    drawn, real = [], source.image
    monkeypatch.setattr(source, "image", lambda i: drawn.append(i) or real(i))
    save_neighbour_grid(source, after, tmp_path / "n.png", 2, 3, before=before)
    assert len(drawn) == 2 * 7
    for row in range(2):
        query, *near = drawn[7 * row : 7 * row + 4]
        similar = F.normalize(before, dim=1) @ F.normalize(before[query], dim=0)
        assert near == [i for i in similar.argsort(descending=True).tolist() if i != query][:3]
        assert all(source.labels[i] == source.labels[query] for i in drawn[7 * row + 4 : 7 * row + 7])
    with pytest.raises(DataError, match="29 vectors"):
        save_neighbour_grid(source, after, tmp_path / "n.png", before=before[:29])


# Runs with labels


@pytest.mark.slow
def test_a_run_with_labels_shows_every_column_untrained(tmp_path: Path) -> None:
    result = run(f"pretrain --data digits-canvas --set subset=200 --batch 40 --epochs 1 --out {tmp_path / 'run'}")
    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if line.startswith("untrained encoder"))
    assert row.count("%") == 5, "k-NN, linear, NMI, ACC, ARI"
    figures = json.loads((tmp_path / "run" / "result.json").read_text())
    assert figures["untrained"]["knn"]["top1"] == pytest.approx(figures["curve"][0]["knn"], abs=0.01)
    assert "RankMe" in result.stdout and "Neighbours:" in result.stdout

    again = run(f"evaluate {tmp_path / 'run'}")
    assert again.exit_code == 0
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    for protocol, key in (("knn", "top1"), ("linear", "top1"), ("clustering", "nmi")):
        own = figures["untrained"][protocol][key]
        assert written["untrained"][protocol][key] == pytest.approx(own, abs=0.01)
    row = next(line for line in again.stdout.splitlines() if line.startswith("untrained encoder"))
    assert row.count("%") == 5
    assert written["note"] is None and (written["step"], written["steps"]) == (5, 5)


def test_costly_protocols_are_not_run_on_the_untrained_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        run_evaluation, "evaluate", lambda encoder, *_, protocols, **__: asked.append((encoder, protocols)) or {}
    )
    judge: Any = run_evaluation.evaluate_labelled
    assert judge("before", "after", None, None, ["finetune"], {}) == {"untrained": None}
    assert judge("before", "after", None, None, ["knn", "few", "corruptions"], {}) == {"untrained": {}}
    assert asked == [("after", ["finetune"]), ("after", ["knn", "few", "corruptions"]), ("before", ["knn", "few"])]


# evaluate without labels


def test_evaluate_without_labels(learned: inbatch.Run, photos: Path) -> None:
    result = run(f"evaluate {words(learned.directory)}")
    assert result.exit_code == 0, result.output
    assert "40 images without labels" in result.stdout and "RankMe" in result.stdout and "untrained" in result.stdout
    written = json.loads((learned.directory / "evaluation.json").read_text())
    for name, measure in learned.result["unlabelled"].items():
        assert written["unlabelled"][name]["better"] == measure["better"]
        for side in ("untrained", "trained"):
            assert written["unlabelled"][name][side] == pytest.approx(measure[side], rel=1e-3)
    for asked in ("--protocol knn", "--from head"):
        refused = run(f"evaluate {words(learned.directory)} {asked}")
        assert refused.exit_code == 2 and "has no labels for the evaluation" in refused.stderr


def test_ranks_compare_what_they_evaluate(
    learned: inbatch.Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts: list[dict[str, object]] = []

    def meet(entry: dict[str, object]) -> None:
        facts.append(entry)
        raise ConfigError("compared")

    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr("inbatch.training.run.assert_equal_across_ranks", meet)
    shutil.copytree(photos, tmp_path / "renamed")
    (tmp_path / "renamed" / "3.png").rename(tmp_path / "renamed" / "3b.png")
    for data, options in ((photos, {}), (tmp_path / "renamed", {}), (photos, {"seed": 5})):
        with pytest.raises(ConfigError, match="compared"):
            inbatch.evaluate_run(learned.directory, data, **options)  # type: ignore[arg-type]
    first, *others = facts
    assert [{name for name in first if one[name] != first[name]} for one in others] == [{"images"}, {"settings"}]


@pytest.mark.slow
def test_evaluate_by_other_images_without_labels(tmp_path: Path, photos: Path) -> None:
    done = tiny("simclr", tmp_path / "run", epochs=1).directory
    grey = torch.randint(0, 255, (20, 1, 28, 28), dtype=torch.uint8)
    evaluation = inbatch.evaluate_run(done, grey)
    assert evaluation["images"] == 20 and evaluation["held_out"] is None
    assert evaluation["unlabelled"].keys() == MEASURES.keys()
    with pytest.raises(ConfigError, match="no labels"):
        inbatch.evaluate_run(done, grey, protocols=["knn"])
    colour = learn(photos, tmp_path / "colour", epochs=1).directory
    assert inbatch.evaluate_run(colour, grey)["images"] == 20


@pytest.mark.slow
def test_real_photographs(tmp_path: Path) -> None:
    """Two epochs on 200 unlabelled photographs: the other view of a photograph is retrieved more often."""
    parquet = pytest.importorskip("pyarrow.parquet")
    file = SHARED / "data" / "tiny-imagenet-100" / "val.parquet"
    if not file.is_file():
        pytest.skip("needs shared/data/tiny-imagenet-100 beside the checkout")
    (tmp_path / "photos").mkdir()
    for i, row in enumerate(parquet.read_table(file).slice(0, 200).to_pylist()):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(row["image"]["bytes"])
    fields = {"image_size": 32, "batch_size": 50, "settings": {"optimizer.name": "adamw", "optimizer.lr": 2e-3}}
    measure = learn(tmp_path / "photos", tmp_path / "run", **fields).result["unlabelled"]["same_image"]
    assert measure["trained"] > measure["untrained"]


@pytest.mark.slow
def test_neighbour_grid_draws_the_encoder_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a run without a step, both sides are the same encoder."""
    built = inbatch.api.prepare("digits-canvas", subset=100, batch_size=50)
    comparison = run_evaluation.compare_with_initial(built, None, tmp_path)
    for measure in comparison["unlabelled"].values():
        assert measure["untrained"] == measure["trained"]
    assert_same_state(
        dict(run_evaluation.initial_encoder(built.recipe, tmp_path).state_dict()), dict(built.encoder.state_dict())
    )


@pytest.mark.slow
def test_a_budget_limits_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = inbatch.api.prepare("digits-canvas", batch_size=50)
    assert run_evaluation.images_within(built, 1e9)[0] == label_free.IMAGES
    images, seconds = run_evaluation.images_within(built, 0.0)
    assert images == 64 and seconds > 1
    measures = run_evaluation.compare_with_initial(built, None, tmp_path, images)["unlabelled"]
    assert "64 images" in measures["rankme"]["what"] and "32 images" in measures["same_image"]["what"]


@pytest.mark.slow
def test_a_run_with_a_budget_keeps_it_with_the_comparison(photos: Path, tmp_path: Path) -> None:
    fields = {"encoder": "tiny", "batch_size": 10, "quiet": True, "image_size": 24, "budget": "1m"}
    result = inbatch.pretrain(photos, out=tmp_path / "run", **fields).result
    assert result["unlabelled"] and result["wall_seconds"] < 90
