"""Encoder `fast`, its whitened features, and images whose size grows during a run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import assert_same_state, leave_out_evaluation

import inbatch
from inbatch.api import embed_run, prepare
from inbatch.data import Subset, open_data
from inbatch.errors import DataError
from inbatch.evaluation import Kept, clustering, embed, evaluate, feature_std, rankme
from inbatch.models import create_encoder, load_encoder, save_encoder
from inbatch.models.readout import Readout
from inbatch.models.whitened_patches import WhitenedPatches
from inbatch.training import checkpoint
from inbatch.training.build import build
from inbatch.training.first_layer import fit_first_layer
from inbatch.training.holdout import EvaluationSplit
from inbatch.training.monitors import online_evaluation
from inbatch.training.monitors.online_evaluation import fit_readout, make_online_evaluator
from inbatch.training.recipe import make
from inbatch.training.resolve import resolve_recipe
from inbatch.training.run_encoder import initial_encoder
from inbatch.training.run_views import image_scale

IMAGES = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def _literal_filters(images: torch.Tensor, kernel: int, stride: int, std: tuple[float, ...]) -> torch.Tensor:
    """Compute the filters of whitened patches, patch by patch."""
    x = images.double() / 255 / torch.tensor(std).view(-1, 1, 1)
    places = range(0, images.shape[-1] - kernel + 1, stride)
    patches = torch.stack([i[:, r : r + kernel, c : c + kernel].flatten() for i in x for r in places for c in places])
    values, vectors = np.linalg.eigh(np.cov(patches.numpy().T, bias=True))
    rows = [vectors[:, i] / np.sqrt(max(values[i], 0) + 1e-2) for i in reversed(range(len(values)))]
    return torch.from_numpy(np.stack(rows)).unflatten(1, (images.shape[1], kernel, kernel))


def _rows(n: int, seed: int = 0) -> torch.Tensor:
    """Draw rows of 6 correlated features of different scales."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g) @ torch.randn(6, 6, generator=torch.Generator().manual_seed(9)) + 3


def test_fast_reduces_any_image_to_about_32_pixels() -> None:
    for size, side in ((20, 20), (32, 32), (64, 32), (96, 48), (128, 32)):
        encoder = create_encoder("fast", size=size, width=8)
        assert encoder.width == 64
        stem = encoder.backbone.stages[0]
        assert stem(torch.randn(2, 3, size, size)).shape[-1] == side


def test_readout_decorrelates_once_it_is_fitted() -> None:
    readout, x = Readout(6, grid=1, eps=1e-6), _rows(20_000)
    assert torch.equal(readout(x), x)  # not fitted yet
    readout.fit(x)
    out = readout(_rows(20_000, 999)).double()
    assert torch.allclose(torch.cov(out.T), torch.eye(6, dtype=torch.float64), atol=0.1)
    assert out.mean(0).abs().max() < 0.1
    readout.forget()
    assert torch.equal(readout(x), x)


def test_readout_equals_the_literal_matrix() -> None:
    readout, x = Readout(6, grid=1, eps=1e-3), _rows(500)
    readout.fit(x)
    values, vectors = torch.linalg.eigh(torch.cov(x.T).double())
    literal = vectors @ torch.diag((values + 1e-3 * values.max()) ** -0.5) @ vectors.T
    assert torch.allclose(readout(x).double(), (x - x.mean(0)).double() @ literal, atol=1e-4)
    few = Readout(6, grid=1, eps=1e-3)
    few.fit(x[:3])  # fewer images than features: finite, and closer to no whitening
    assert torch.isfinite(few(x)).all()


def test_pooled_features_if_the_map_has_other_channels() -> None:
    """Layers behind the pooling change their number (MobileNetV3), or the channels are last (Swin)."""
    for name, size in (("mobilenetv3_small_050", 32), ("swin_tiny_patch4_window7_224", 32)):
        encoder = create_encoder(name, size=size, whiten=True).eval()
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            assert torch.equal(encoder.represent(x), encoder(x).repeat(1, encoder.feature_width // encoder.width))


def test_plain_features_are_got_back() -> None:
    readout, x = Readout(6, grid=1), _rows(500)
    assert readout.unwhitened(x) is x  # not fitted yet
    readout.fit(x)
    with readout.paused():
        assert torch.equal(readout(x), x)
    assert torch.allclose(readout.unwhitened(readout(x)), x, atol=1e-4)


def test_clusters_and_spread_are_found_before_whitening(tmp_path: Path) -> None:
    """Whitening gives every direction the same weight, so k-means on whitened features is less accurate."""
    labels = torch.arange(64) % 4
    encoder = create_encoder("fast", size=32, width=8, whiten=True, whiten_patches=True).eval()
    source = open_data((IMAGES, labels))
    plain = embed(encoder, source)
    fit_readout(encoder, source)
    evaluation = evaluate(encoder, source, source, protocols=["knn", "clustering"], k=5)
    assert evaluation["clustering"] == clustering(plain) | {"split": "test", "features": "before whitening"}
    assert "features" not in evaluate(None, plain, plain, protocols=["clustering"])["clustering"]

    built = build(
        *resolve_recipe((IMAGES, labels), {"preset": "fast", "encoder.width": 8, "epochs": 1, "batch_size": 16}),
        device=CPU,
    )
    built.encoder.load_state_dict(encoder.state_dict())
    spread = make_online_evaluator(built, EvaluationSplit(source, source, "all"))()
    assert spread["rankme"] == pytest.approx(float(rankme(plain.vectors)), rel=1e-3)
    assert spread["feature_std"] == pytest.approx(float(feature_std(plain.vectors)), rel=1e-3)

    save_encoder(encoder, tmp_path / "encoder")
    for plainly, expected in ((True, plain.vectors), (False, embed(encoder, source).vectors)):
        embed_run(tmp_path / "encoder", IMAGES, tmp_path / "f.npz", plain=plainly)
        rows = torch.from_numpy(np.load(tmp_path / "f.npz")["vector"])
        assert torch.allclose(rows, expected, atol=1e-3)


def test_readout_is_fitted_to_a_sample_of_images_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_evaluation, "BANK", 8)
    source = open_data(IMAGES[:20])
    stored, kept = (create_encoder("tiny", size=32, whiten=True) for _ in range(2))
    kept.load_state_dict(stored.state_dict())
    fit_readout(stored, source)
    fit_readout(kept, Kept(source))
    assert stored.readout is not None and kept.readout is not None
    assert int(kept.readout.images) == 8 and torch.equal(kept.readout.mean, stored.readout.mean)


def test_readout_pools_over_quarters_unless_that_is_too_wide() -> None:
    assert Readout(512).grid == 2 and Readout(512).width == 2048 and Readout(513).grid == 1
    maps = torch.randn(3, 5, 4, 4)
    quarters = torch.stack([maps[:, :, i : i + 2, j : j + 2].mean((2, 3)) for i in (0, 2) for j in (0, 2)], 2)
    assert torch.allclose(Readout(5)(maps), quarters.flatten(1))
    assert Readout(5)(torch.randn(3, 5)).shape == (3, 20)


@pytest.mark.slow
def test_a_saved_encoder_keeps_its_readout_and_heads_see_plain_features(tmp_path: Path) -> None:
    for name in ("fast", "tiny", "torchvision/resnet18"):
        encoder = create_encoder(name, size=16, whiten=True).eval()
        images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
        plain = encoder(encoder.prepare(images[:4]))
        assert encoder.readout is not None
        encoder.readout.fit(torch.from_numpy(encoder.embed(images)))
        assert torch.equal(encoder(encoder.prepare(images[:4])), plain)
        save_encoder(encoder, tmp_path / name)
        again = load_encoder(tmp_path / name)
        assert (again.embed(images[:4]) == encoder.embed(images[:4])).all()
    path = tmp_path / "fast/readout.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="damaged"):
        load_encoder(tmp_path / "fast")
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        load_encoder(tmp_path / "fast")


def test_images_grow_from_a_share_of_their_side_at_a_share_of_the_run() -> None:
    settings = {
        "preset": "fast",
        "encoder.width": 8,
        "steps": 10,
        "batch_size": 16,
        "grow_from": 0.5,
        "grow_until": 0.6,
    }
    recipe, source = resolve_recipe(IMAGES, settings)
    assert [image_scale(recipe, step / 10) for step in (0, 5, 6, 9)] == [0.5, 0.5, 1.0, 1.0]
    built = build(recipe, source, device=CPU)
    sides: list[int] = []
    built.encoder.register_forward_hook(lambda module, inputs, output: sides.append(inputs[0].shape[-1]))
    for batch in built.loader.epoch(0):
        built.step(batch, 0)
        built.step(batch, 9)
        break
    assert sides == [16, 16, 32, 32]


def test_the_preset_fast_is_there_for_every_method() -> None:
    for method in ("simclr", "byol", "moco", "barlow"):
        recipe, _ = resolve_recipe(IMAGES, {"preset": "fast", "method.name": method, "epochs": 1})
        assert recipe.encoder.name == "fast" and recipe.optimizer.name == "adamw" and recipe.preset == "fast"


@pytest.mark.slow
def test_fast_learns_from_a_small_run(tmp_path: Path) -> None:
    run = inbatch.pretrain(IMAGES, out=tmp_path / "run", preset="fast", epochs=2, batch_size=16, quiet=True,
                           settings={"encoder.width": 8})  # fmt: skip
    losses = [entry["loss"] for entry in run.result["curve"] if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    assert run.encoder.embed(IMAGES[:4]).shape == (4, 256)


def test_whitened_patches_equal_the_literal_components() -> None:
    for channels, size, kernel, stride, components in ((3, 16, 3, 1, 12), (1, 16, 3, 1, 12), (3, 32, 7, 4, 12)):
        images = IMAGES[:20, :channels, :size, :size].clone()
        images[..., 1:] = images[..., 1:] // 2 + images[..., :-1] // 2  # similar neighbours, as in photographs
        std = (0.2, 0.25, 0.3)[:channels]
        layer = WhitenedPatches(channels, components, kernel, stride)
        layer.fit(images, std)
        half = min(components, channels * kernel**2)
        assert layer.weight.shape == (2 * half, channels, kernel, kernel)
        assert torch.equal(layer.weight[half:], -layer.weight[:half])
        literal = _literal_filters(images, kernel, stride, std)[:half].to(layer.weight)
        same = (layer.weight[:half] * literal).flatten(1).sum(1).abs() / literal.flatten(1).square().sum(1)
        assert torch.allclose(same, torch.ones(half), atol=1e-3)
        assert not list(layer.parameters())


def test_whitened_patches_do_not_depend_on_threads_and_take_flat_images() -> None:
    filters = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            layer = WhitenedPatches(3)
            layer.fit(IMAGES, (0.229, 0.224, 0.225))
        finally:
            torch.set_num_threads(before)
        filters.append(layer.weight.clone())
    assert torch.equal(*filters)
    layer.fit(torch.full((2, 3, 32, 32), 255, dtype=torch.uint8), (0.2, 0.2, 0.2))
    assert torch.isfinite(layer.weight).all()


def test_a_first_layer_of_whitened_patches_stays_as_the_images_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is computed from the images, is not trained, and is part of the untrained encoder, resume, init and files."""
    leave_out_evaluation(monkeypatch)
    settings = {"encoder.width": 8}
    run = inbatch.pretrain(IMAGES, "byol", out=tmp_path / "run", preset="fast", epochs=1, batch_size=16, quiet=True,
                           settings=settings)  # fmt: skip

    def filters(encoder: torch.nn.Module) -> torch.Tensor:
        return next(m for m in encoder.modules() if isinstance(m, WhitenedPatches)).weight

    expected = WhitenedPatches(3)
    expected.fit(IMAGES, run.encoder.std)
    assert torch.equal(filters(run.encoder), expected.weight)
    assert torch.equal(filters(initial_encoder(run.recipe, tmp_path / "run")), expected.weight)
    state = checkpoint.load(tmp_path / "run/checkpoints").state
    for part in ("network", "target"):
        assert torch.equal(state[part]["encoder.backbone.stages.0.0.weight"], expected.weight)
    other = IMAGES.flip(0) // 2
    again = inbatch.pretrain(other, out=tmp_path / "again", preset="fast", epochs=1, batch_size=16, quiet=True,
                             settings={"encoder.init": str(tmp_path / "run")})  # fmt: skip
    assert torch.equal(filters(again.encoder), expected.weight)  # of the run that it starts from
    assert torch.equal(filters(load_encoder(tmp_path / "again/encoder")), expected.weight)

    older = create_encoder("fast", size=32, width=8)
    save_encoder(older, tmp_path / "older")
    recipe = prepare(
        IMAGES, preset="fast", epochs=1, batch_size=16, settings={"encoder.init": str(tmp_path / "older")}
    ).recipe
    assert recipe.encoder.options["whiten_patches"] is False


def test_unreadable_images_do_not_reach_the_first_layer(tmp_path: Path) -> None:
    for i in range(6):
        Image.fromarray(IMAGES[i].permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    whole = open_data(tmp_path)
    wanted, actual = (create_encoder("fast", size=32, width=8, whiten_patches=True) for _ in range(2))
    fit_first_layer(wanted, Subset(whole, torch.tensor([0, 1, 3, 4, 5]), "all but one"))
    data = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(data[: len(data) // 2])
    fit_first_layer(actual, open_data(tmp_path))
    assert_same_state(dict(actual.backbone.stages[0][0].state_dict()), dict(wanted.backbone.stages[0][0].state_dict()))
    for path in tmp_path.glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    before = actual.backbone.stages[0][0].weight.clone()
    fit_first_layer(actual, open_data(tmp_path))  # the loader reports that nothing can be read
    assert torch.equal(actual.backbone.stages[0][0].weight, before)


def test_the_recipe_of_an_older_run_does_not_get_the_first_layer_from_the_preset() -> None:
    recipe, _ = resolve_recipe(IMAGES, {"preset": "fast", "epochs": 1, "batch_size": 16})
    assert recipe.encoder.options["whiten_patches"] is True
    older = {key: value for key, value in recipe.flat().items() if key != "encoder.whiten_patches"}
    assert "whiten_patches" not in make(older).encoder.options and make(recipe.flat()) == recipe
