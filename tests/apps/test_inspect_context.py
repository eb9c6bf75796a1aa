"""`inbatch inspect`: pictures and figures of the plug-ins of a run, and the benchmark of their cost."""

import importlib.util
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import leave_out_evaluation, stop_after, tiny
from typer.testing import CliRunner, Result

import inbatch
import inbatch.apps.reports.batch_context as pictures
from inbatch import api
from inbatch.apps.cli import app
from inbatch.apps.reports import attention_picture, picture_sheet, view_grid
from inbatch.context.curation import pair_distances, violating
from inbatch.context.grouped import as_group
from inbatch.errors import ConfigError, DataError, Preempted
from inbatch.models.attention_slots import blocks
from inbatch.runtime.picture_mark import png_mark
from inbatch.training import checkpoint
from inbatch.training.build import RunComponents, build
from inbatch.training.run import source_of

COUNT = 3
CELL, GAP = picture_sheet.CELL, picture_sheet.GAP


def run(line: str) -> Result:
    return CliRunner().invoke(app, shlex.split(line), catch_exceptions=False, env={"COLUMNS": "200", "NO_COLOR": "1"})


def shown(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, narrow: None) -> Path:
    """Return the directory of a finished run with every kind of plug-in, ba2m for attention."""
    out = tmp_path_factory.mktemp("runs") / "full"
    settings = {"curate.name": "redraw", "curate.budget": None, "fuse.name": "conv", "attend.name": "ba2m"}
    with pytest.MonkeyPatch.context() as patch:
        leave_out_evaluation(patch)
        tiny("simclr", out, settings=settings, subset=80, precision="float32")
    return out


@pytest.fixture(scope="module")
def report(full: Path) -> dict:
    return inbatch.inspect_run(full, count=COUNT)


def rebuilt(folder: Path) -> RunComponents:
    """Build the parts of a run with its weights, without `inspect_run`."""
    recipe = api.load_run(folder).recipe
    built = build(recipe, source_of(recipe, None), device=torch.device("cpu"))
    built.network.load_state_dict(checkpoint.load(folder / "checkpoints").state["network"])
    return built


@pytest.mark.slow
def test_every_plug_in_has_its_picture(full: Path, report: dict) -> None:
    names = {"views.png", "redrawn.png", "fused.png", "attention.png"}
    assert {Path(p).name for p in report["pictures"]} == names == {p.name for p in (full / "inspect").iterdir()}
    assert shown(full / "inspect/views.png").shape == ((CELL + GAP) * COUNT + GAP, (CELL + GAP) * 3 + GAP, 3)
    for name in names:
        assert len(np.unique(shown(full / "inspect" / name))) > 50, "it shows something"
    assert report["step"] == 4 and report["epoch"] == 2, "what would come next"
    assert report["run"] == str(full) and report["note"] is None


def test_the_numbers_are_those_of_the_first_batch(full: Path, report: dict) -> None:
    built = rebuilt(full)
    batch = next(iter(built.loader.epoch(2)))
    views = built.views(batch).images
    with built.network.evaluating():
        z = torch.stack([built.network.features(view) for view in views])
    share = violating(*pair_distances(z, z, 0)).float().mean()
    assert report["curate"]["violating_before"] == pytest.approx(float(share))
    assert report["curate"]["begun"] and report["curate"]["samples"] == 40

    group = [view[:20] for view in built.views(built.step.curator(batch)[0]).images]
    with torch.no_grad():
        mixed = built.network.fuse(group[1])
    assert report["fuse"]["change"] == pytest.approx(float((mixed - group[1]).abs().mean()), rel=1e-4)
    assert 0 < report["fuse"]["added"] < report["fuse"]["change"] and report["fuse"]["view"] == 1

    inputs: list[torch.Tensor] = []
    last = blocks(built.encoder)[-1]
    last.register_forward_hook(lambda block, x, y: inputs.append(x[0]))
    with built.network.evaluating(), as_group(built.network):
        built.network.features(group[0])
        weights = last.weights(inputs[0])
    attention = report["attend"]["blocks"]
    assert [block["block"] for block in attention] == list(built.encoder.slots) and report["attend"]["group"] == 20
    assert attention[-1]["mean"] == pytest.approx(1)
    assert attention[-1]["largest"] == pytest.approx(float(weights.max()), rel=1e-4)
    assert attention[-1]["least"] < 1 < attention[-1]["largest"]
    assert report["leak"]["leak_chance"] == 1 / 4 and 0 <= report["leak"]["leak"] <= 1


@pytest.mark.slow
def test_looking_changes_no_part_of_the_run(full: Path, tmp_path: Path) -> None:
    built = rebuilt(full)
    before = {name: x.clone() for name, x in built.network.state_dict().items()}
    pictures.draw_report(built, 2, tmp_path, COUNT)
    assert all(torch.equal(x, before[name]) for name, x in built.network.state_dict().items())
    assert built.network.training and not any(m._forward_pre_hooks for m in built.network.modules())


@pytest.mark.slow
def test_the_seed_chooses_and_an_earlier_look_is_replaced(full: Path, tmp_path: Path) -> None:
    kept = {name: shown(full / "inspect" / name) for name in ("views.png", "fused.png")}
    Image.new("RGB", (4, 4)).save(tmp_path / "attention.png", pnginfo=png_mark())  # of an earlier look
    (tmp_path / "mine.txt").touch()
    inbatch.inspect_run(full, out=tmp_path, count=COUNT)
    assert all(np.array_equal(shown(tmp_path / name), kept[name]) for name in kept), "the same seed draws the same"
    assert len(shown(tmp_path / "attention.png")) > 100 and (tmp_path / "mine.txt").exists()
    inbatch.inspect_run(full, out=tmp_path, count=COUNT, seed=1)
    assert not np.array_equal(shown(tmp_path / "views.png"), kept["views.png"])


def test_pictures_of_the_user_are_kept(full: Path, tmp_path: Path) -> None:
    """All names of pictures were removed from the folder, also of those that the run has none of."""
    Image.new("RGB", (4, 4)).save(tmp_path / "mixed.png")
    with pytest.raises(ConfigError, match=r"mixed.png is not a picture of inbatch"):
        inbatch.inspect_run(full, out=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mixed.png"]


@pytest.mark.slow
def test_a_plain_run_has_its_views_alone(tmp_path: Path) -> None:
    tiny("simclr", tmp_path / "run", subset=80, epochs=1, batch_size=40, context=None)
    (tmp_path / "run/inspect").mkdir()
    (tmp_path / "run/inspect/fused.png").touch()
    shown_ = run(f"inspect {tmp_path / 'run'} --count 2")
    assert shown_.exit_code == 0 and "groups" in shown_.stdout and "fuse" not in shown_.stdout
    assert [p.name for p in (tmp_path / "run/inspect").iterdir()] == ["views.png"]
    assert "fewer than two groups" not in shown_.stdout  # two batches are two groups


@pytest.mark.slow
def test_batchformer_shows_attention_between_samples(tmp_path: Path) -> None:
    settings = {"attend.name": "batchformer", "fuse.name": "set", "fuse.views": [0, 1]}
    tiny("byol", tmp_path / "run", settings=settings, subset=80, epochs=1, precision="float32")
    report = inbatch.inspect_run(tmp_path / "run", count=COUNT)
    (block,) = report["attend"]["blocks"]
    assert block["mean"] == pytest.approx(1 / 20) and block["least"] < 1 / 20 < block["largest"]
    width = shown(tmp_path / "run/inspect/attention.png").shape[1]
    assert width >= (CELL + GAP) * (1 + attention_picture.NEIGHBOURS)
    assert report["fuse"]["view"] == 0


def test_neighbours_are_the_largest_weights_but_one_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[picture_sheet.Row] = []
    monkeypatch.setattr(attention_picture, "sheet", lambda title, rows: lines.extend(rows))
    weights = torch.tensor([[0.5, 0.1, 0.4], [0.2, 0.1, 0.7], [0.3, 0.6, 0.1]])
    tiles = [Image.new("RGB", (1, 1), colour) for colour in ("red", "green", "blue")]
    attention_picture._neighbours(tiles, weights, 2)
    order = [[tiles.index(tile) for tile, _ in row.cells] for row in lines]
    assert order == [[0, 2, 1], [1, 2, 0]]
    assert [text for _, text in lines[1].cells] == ["itself 10.00%", "70.00%", "20.00%"]
    lines.clear()
    attention_picture._weighed(tiles, {"a": torch.tensor([0.2, 1.7, 1.1])}, 8)
    assert [(tiles.index(tile), text) for tile, text in lines[0].cells] == [(1, "1.700"), (2, "1.100"), (0, "0.200")]


@pytest.mark.grid(1)
@pytest.mark.parametrize(("margin", "count"), [(-10.0, 0), (10.0, 40)])
def test_violators_and_their_redraws(
    margin: float, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If all pairs keep the margin, there is a sentence instead of a picture; if none does, all are redrawn."""
    settings = {"curate.name": "redraw", "curate.margin": margin, "curate.rounds": 2, "curate.warmup": 0.9}
    leave_out_evaluation(monkeypatch)
    tiny("simclr", tmp_path / "run", settings=settings, subset=80, epochs=1)
    result = run(f"inspect {tmp_path / 'run'} --count 2")
    assert result.exit_code == 0 and f"{100 * count / 40:.1f}% of 40" in result.stdout
    assert ("no sample violates" in result.stdout) == (count == 0)
    png = tmp_path / "run/inspect/redrawn.png"
    assert png.exists() == (count > 0)
    if count:
        picture, strip = shown(png), 3 * (CELL + GAP) + GAP
        places = [(GAP, GAP), (GAP, GAP + strip + GAP)]
        title = 3 * picture_sheet.LINE + 2 * GAP
        before, after = (picture[title : title + CELL, x : x + strip] for _, x in places)
        assert not np.array_equal(before[:, CELL + 2 * GAP :], after[:, CELL + 2 * GAP :]), "other views"


def test_the_redraw_that_is_shown_is_the_one_that_was_learned_from(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, strips = rebuilt(full), []
    batch = next(iter(built.loader.epoch(2)))
    drawn = built.views(batch)
    monkeypatch.setattr(
        pictures, "_grid", lambda b, o, d, which: strips.append([v[which][0] for v in d.images]) or tile
    )
    tile = Image.new("RGB", (1, 1))
    images, statistics, _ = pictures.redrawn(built, batch, COUNT)
    assert statistics["rounds"] == 3 and len(strips) == 2 * COUNT
    for before, after in zip(strips[::2], strips[1::2], strict=True):
        (sample,) = [i for i in range(40) if torch.allclose(before[0], drawn.images[0][i], atol=1e-5)]
        assert all(torch.allclose(view, image[sample], atol=1e-5) for view, image in zip(after, images, strict=True))


@pytest.mark.slow
def test_a_stopped_run_can_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run stopped in a curated epoch shows it; one stopped earlier names and shows the first curated epoch."""
    out, settings = tmp_path / "run", {"curate.name": "redraw", "curate.warmup": 0.5}
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 3)
        tiny("simclr", out, settings=settings, epochs=4)
    result = run(f"inspect {out} --json --count 2")
    report = json.loads(result.stdout)
    assert report["step"] == 3 and report["epoch"] == 2 and not report["curate"]["begun"]
    assert "before its first curated epoch, 3" in run(f"inspect {out} --count 2").stdout


def test_groups_are_those_that_the_run_had(full: Path, tmp_path: Path) -> None:
    """Two processes had a group each: the result of the run contains this, its recipe does not."""
    shutil.copytree(full, tmp_path / "run")
    recipe = json.loads((tmp_path / "run/recipe.json").read_text())
    (tmp_path / "run/recipe.json").write_text(json.dumps(recipe | {"context": None}))
    assert inbatch.inspect_run(tmp_path / "run", count=2)["attend"]["group"] == 20


@pytest.mark.slow
def test_runs_that_cannot_be_looked_at(full: Path, tmp_path: Path) -> None:
    def refused(words: str, code: int, *sentences: str) -> None:
        result = run(f"inspect {words}")
        assert result.exit_code == code and result.stderr.startswith("error: ")
        assert all(sentence in result.stderr for sentence in sentences) and "Traceback" not in result.stderr

    refused(f"{tmp_path / 'none'}", 2, "not the folder of a run")
    shutil.copytree(full, tmp_path / "run")
    refused(f"{full} --out {full / 'recipe.json'}", 1, "Cannot write")
    recipe = json.loads((tmp_path / "run/recipe.json").read_text())
    (tmp_path / "run/recipe.json").write_text(json.dumps(recipe | {"data": str(tmp_path / "moved")}))
    refused(f"{tmp_path / 'run'}", 3, "moved", "Pass --data")
    assert run(f"inspect {tmp_path / 'run'} --data digits-canvas --count 1").exit_code == 0
    shutil.rmtree(tmp_path / "run/checkpoints")
    refused(f"{tmp_path / 'run'}", 2, "No checkpoint")
    with pytest.raises(ConfigError, match="count must be at least 1"):
        inbatch.inspect_run(full, count=0)
    with pytest.raises(DataError, match="the images of the run"):
        inbatch.inspect_run(full, tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("batch", [8])
def test_images_of_several_sizes_cropped_by_workers(batch: int, tmp_path: Path) -> None:
    """Images that were not passed whole to the main process are opened again."""
    (tmp_path / "photos").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (2 * batch, 40, 50, 3), dtype=np.uint8)):
        Image.fromarray(pixels[: 24 + i]).save(tmp_path / "photos" / f"{i}.png")
    settings = {"encoder.name": "tiny", "views.name": "simclr_cifar", "attend.name": "se"}
    api.pretrain(
        tmp_path / "photos", out=tmp_path / "run", batch_size=batch, epochs=1, image_size=20, cache_on_device=False,
        workers=0,
        settings=settings, context=4, quiet=True,
    )  # fmt: skip
    result = run(f"inspect {tmp_path / 'run'} --count 2")
    assert result.exit_code == 0 and "attention within each sample only" in result.stdout
    assert [p.name for p in (tmp_path / "run/inspect").iterdir()] == ["views.png"]


@pytest.mark.slow
def test_views_are_cut_as_the_crops_say(tmp_path: Path) -> None:
    """Pairs drawn to be disjoint are disjoint, and the picture shows them."""
    seen = []
    for name in ("default", "adjacent"):
        png = tmp_path / f"{name}.png"
        words = f"views digits-canvas-colour --views simclr_cifar --crops {name} --count 4 -o {png}"
        assert run(words).exit_code == 0
        seen.append(shown(png))
    assert seen[0].shape == seen[1].shape and not np.array_equal(*seen)
    result = run(f"views digits-canvas --crops adjacent -o {tmp_path / 'x.png'}")
    assert result.exit_code == 2 and "cut at random" in result.stderr
    assert run(f"views digits-canvas --crops adjacnt -o {tmp_path / 'x.png'}").exit_code == 2


@pytest.mark.slow
def test_adjacent_views_do_not_overlap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from inbatch.data.views.crop_pairs import ADJACENT, configuration

    boxes: list[torch.Tensor] = []
    monkeypatch.setattr(view_grid, "save_grid", lambda out, images, drawn, mean, std: boxes.append(drawn.boxes))
    fields = {"views": "simclr_cifar", "count": 20}
    inbatch.draw_views("digits-canvas-colour", tmp_path / "x.png", crops="adjacent", **fields)
    inbatch.draw_views("digits-canvas-colour", tmp_path / "x.png", **fields)
    shares = [float((configuration(b) == ADJACENT).float().mean()) for b in boxes]
    assert shares[0] == 1 and shares[1] < 0.5


@pytest.mark.slow
def test_the_benchmark_of_cost_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = Path(__file__).resolve().parents[2] / "benchmarks" / "context.py"
    spec = importlib.util.spec_from_file_location("context_cost", file)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    words = "--device cpu --sizes 20 --batch 16 --encoder tiny --repeat 2 --warm 1 --share 0.25"
    result = benchmark.main([*words.split(), "--out", str(tmp_path / "cost.json")])
    assert json.loads((tmp_path / "cost.json").read_text()) == json.loads(json.dumps(result))
    rows = result["sizes"]["20"]
    assert list(rows) == list(benchmark.ENTRIES)
    assert all(row["seconds"] > 0 and row["kept_bytes"] > 0 for row in rows.values())
    assert rows["simclr"]["ratio"] == 1 and rows["attend ba2m"]["kept_bytes"] > rows["simclr"]["kept_bytes"]
    assert (
        rows[benchmark.GROUPS]["context"] == 4 and rows[benchmark.GROUPS]["kept_bytes"] < rows["simclr"]["kept_bytes"]
    )
    every, few = rows["curate"]["curate"], rows[benchmark.SHARE]["curate"]
    assert every["violating_before"] > few["violating_before"] and every["redrawn"] >= few["redrawn"] > 0
    assert "ratio_to_groups" in rows[f"{benchmark.GROUPS}, shuffled"]
    assert "fuse conv" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        benchmark.main(["--batch", "10"])


def test_a_folder_of_earlier_pictures_is_no_reason_for_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*args: object, **options: object) -> None:
        raise Preempted("parsed")

    monkeypatch.setattr("inbatch.apps.reports.batch_context.inspect_run", cut)
    (tmp_path / "inspect").mkdir()
    assert run(f"inspect {tmp_path}").stderr.strip() == "error: parsed"


def test_images_have_the_size_of_the_inspected_epoch(tmp_path: Path) -> None:
    """While images are small (`grow_from`), groups and violators are those of small images."""
    settings = {"curate.name": "redraw", "fuse.name": "set", "grow_from": 0.5, "grow_until": 0.6}
    built = api.prepare("digits-canvas", subset=80, batch_size=16, context=8, epochs=10, settings=settings)
    assert built.step.curator is not None and built.step.curator.snapshot is not None
    sides: list[int] = []
    for network in (built.network, built.step.curator.snapshot):
        network.encoder.register_forward_hook(lambda module, inputs, output: sides.append(inputs[0].shape[-1]))
    for epoch, side in ((2, built.recipe.image_size // 2), (10, built.recipe.image_size)):
        sides.clear()
        pictures.draw_report(built, epoch, tmp_path, count=2)
        assert set(sides) == {side}
