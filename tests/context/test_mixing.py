"""Mixing: pure draws, the step over groups and ranks, resume, every method, and refused combinations."""

import functools
import math
from pathlib import Path

import pytest
import small_methods as small
import torch
from rank_pool import on_ranks
from small_methods import VARIANTS, create, literal, train
from small_runs import assert_same_state, saved, stop_after, tiny
from step_states import N, assert_same
from torch import Tensor

from inbatch import api
from inbatch.context.mixing import MIXERS, IMix, UnMix
from inbatch.errors import ConfigError, Preempted
from inbatch.methods import METHODS
from inbatch.rng import fold
from inbatch.training.mixing import MIXING, StepMixing
from inbatch.training.size_estimate import estimate

MIXABLE = [variant for variant in VARIANTS if create(variant).mixed_keys]


@pytest.mark.parametrize("name", MIXERS)
def test_draws_are_pure_functions_of_key_and_place(name: str) -> None:
    """Every group is mixed within itself; its draws do not depend on the other groups, but on the key."""
    mixer, places = MIXERS[name](), torch.arange(24).view(3, 8)
    draws, again, other = (mixer.draw(key, places, (5, 7)) for key in (4, 4, 5))
    size = mixer.size(8)
    assert draws.partner.shape == draws.share.shape == (3, size)
    for a, b in zip(vars(draws).values(), vars(again).values(), strict=True):
        assert a is b is None or torch.equal(a, b)
    assert not torch.equal(draws.share, other.share)
    single = mixer.draw(4, places[1:2], (5, 7))
    assert torch.equal(single.partner[0], draws.partner[1]) and torch.equal(single.share[0], draws.share[1])
    for partner in draws.partner:
        assert sorted(partner.tolist()) == list(range(8 - size, 8))
    assert ((draws.share >= (0.5 if name == "imix" else 0)) & (draws.share <= 1)).all()
    assert (len(draws.share.unique()) == 1) == (name == "unmix")


@pytest.mark.parametrize("alpha", [0.3, 4.0])
def test_shares_are_of_the_beta_distribution(alpha: float) -> None:
    """Beta(a, a) has the mean 1/2 and the variance 1 / (8 a + 4); folding keeps the distance to 1/2."""
    folded = IMix(alpha).draw(1, torch.arange(20000).view(1, -1), (1, 1)).share
    assert (folded - 0.5).square().mean() == pytest.approx(1 / (8 * alpha + 4), rel=0.03) and folded.min() >= 0.5
    kept = MIXERS["cutmix"](alpha).draw(1, torch.arange(20000).view(1, -1), (1000, 1000)).share
    assert kept.min() >= 0 and kept.mean() > 0.5, "boxes are cut at the border"
    mixer, pair = UnMix(alpha, region=0.0), torch.arange(2).view(1, 2)
    drawn = torch.stack([mixer.draw(key, pair, (1, 1)).share[0, 0] for key in range(200)])
    assert drawn.mean() == pytest.approx(0.5, abs=0.1)
    assert drawn.var() == pytest.approx(1 / (8 * alpha + 4), rel=0.25)


def test_the_share_of_a_box_is_the_kept_area() -> None:
    """Counted in pixels, cut at the border; Un-Mix draws a box with its probability, one for the batch."""
    places, x = torch.arange(8).view(1, 8), torch.arange(8.0)[:, None, None, None].expand(8, 1, 6, 9)
    for key in range(5):
        draw = MIXERS["cutmix"]().draw(key, places, (6, 9))
        images = draw.images(0, x)
        for i, image in enumerate(images):
            partner = int(draw.partner[0, i])
            kept = (image == i).double().mean() if partner != i else draw.share[0, i]
            assert kept == pytest.approx(float(draw.share[0, i])) and set(image.unique().tolist()) <= {i, partner}
    boxes = [UnMix(region=0.25).draw(key, places, (6, 9)).box for key in range(100)]
    assert 0.15 < sum(box is not None for box in boxes) / 100 < 0.35
    assert UnMix(region=0.0).draw(0, places, (6, 9)).box is None
    assert all((box == box[0, 0]).all() for box in boxes if box is not None)


def plugs_of(name: str) -> tuple[str, ...]:
    return tuple(name.split())


def samples_of(plugs: str) -> int:
    """Return the batch size: MixCo mixes half a group, and a norm of two samples amplifies rounding."""
    return 2 * N if "mixco" in plugs else N


@functools.cache
def expected(variant: str, plugs: str, groups: int) -> dict[str, list]:
    return literal(variant, samples_of(plugs), groups, plugs=plugs_of(plugs))


PAIRS = [(variant, name) for variant in MIXABLE for name in MIXERS]
PAIRS += [
    ("simclr", "imix group"),
    ("simclr", "mixco similar"),
    ("moco", "imix hard"),
    ("moco", "unmix hard"),
    ("mocov3", "unmix similar"),
    ("dcl", "cutmix group"),
    ("hcl", "imix group"),
    ("supcon", "mixco group"),
]
PAIRS += [(variant, f"{name} {more}") for name in MIXERS for more in ("set", "ba2m shuffle curate")
          for variant in ("simclr", "byol", "moco", "supervised")]  # fmt: skip


@pytest.mark.grid(6)
@pytest.mark.parametrize(("variant", "plugs"), PAIRS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_equal_plain_autograd(variant: str, plugs: str, groups: int) -> None:
    assert_same(train(variant, samples_of(plugs), groups, plugs=plugs_of(plugs)), expected(variant, plugs, groups))


def train_one(variant: str, plugs: str, groups: int, synced: bool, dropout: float) -> dict:
    small.DROPOUT = dropout
    return train(variant, samples_of(plugs), groups, synced=synced, plugs=plugs_of(plugs))


@pytest.mark.grid(1)
@pytest.mark.parametrize(("variant", "plugs"), PAIRS)
@pytest.mark.parametrize(("world", "groups"), [(2, 1), (2, 2)])
def test_ranks_equal_plain_autograd(variant: str, plugs: str, world: int, groups: int) -> None:
    for result in on_ranks(world, train_one, variant, plugs, groups, False, 0.2):
        assert_same(result, expected(variant, plugs, world * groups))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["simclr", "byol", "moco-symmetric", "relation"])
@pytest.mark.parametrize("name", MIXERS)
def test_a_group_over_two_ranks_is_one_group(variant: str, name: str) -> None:
    whole = on_ranks(1, train_one, variant, name, 1, True, 0.0)[0]
    for result in on_ranks(2, train_one, variant, name, 1, True, 0.0):
        assert_same(result, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("method", ["simclr", "moco", "supervised"])
def test_resuming_is_bit_exact(method: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny(method, tmp_path / "whole", mix=name)
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        stop_after(patch, 3)
        tiny(method, tmp_path / "cut", mix=name)
    tiny(method, tmp_path / "cut", resume=True, mix=name)
    assert_same_state(saved(tmp_path / "cut"), saved(tmp_path / "whole"))


def test_a_fusion_is_trained_if_only_the_mixed_view_learns() -> None:
    """SimSiam and SwAV have no gradient through the plain view, which would be fused without mixing."""
    for method in ("simsiam", "swav"):
        built = prepared(method, "imix", fuse="conv")
        built.step(next(iter(built.loader.epoch(0))), 0)
        assert all(p.grad.any() for n, p in built.network.named_parameters() if n.startswith("fuse.")), method
        with pytest.raises(ConfigError, match=f"{method} with mixed images .*learns from view 0 only"):
            prepared(
                method, "cutmix" if method == "swav" else "imix", settings={"fuse.name": "conv", "fuse.views": [1]}
            )


def test_a_step_mixes_by_its_number_only() -> None:
    """Mixed images and targets depend on the number of the step, not on the steps before."""
    method, x = create("simclr"), torch.randn(8, 3, 5, 5, dtype=torch.float64)

    def mixed(step: int) -> list[Tensor]:
        mixing = StepMixing(IMix(), method, 2, fold(3, step, MIXING), 2, 8, False)
        images = [mixing.images(0, g, x[4 * g : 4 * g + 4]) for g in (1, 0)]
        return [*images, mixing.mixture(0, x).positive, mixing.mixture(0, x).weight]

    one, _, again, other = (mixed(step) for step in (7, 8, 7, 9))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one[:2], other[:2], strict=True))


def prepared(method: str, name: str, **fields: object) -> api.RunComponents:
    options = small.small_settings(method)
    if method == "swav":
        options |= {"method.queue_size": 0, "views.name": "simclr_cifar"}
    arguments = {"subset": 40, "batch_size": 8, "context": 4, "epochs": 2, "device": "cpu", "mix": name} | fields
    return api.prepare("digits-canvas", method, settings=options | arguments.pop("settings", {}), **arguments)


@pytest.mark.grid(2)
@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if cls.mixed_keys and not cls.teacher])
@pytest.mark.parametrize("more", [{}, {"fuse": "set"}, {"attend": "batchformer"}, {"shuffle_groups": True},
                                  {"settings": {"curate.name": "redraw", "curate.warmup": 0.0}},
                                  {"negatives": "drop-similar"}])  # fmt: skip
def test_every_method_with_soft_targets_trains(method: str, name: str, more: dict) -> None:
    if more.get("negatives", "drop-similar") not in METHODS[method].negatives and "negatives" in more:
        more = {"negatives": METHODS[method].negatives[0]} if METHODS[method].negatives else {}
    built = prepared(method, name, **more)
    first, steps = next(built.network.parameters()), built.loader.steps
    before = first.detach().clone()
    for step in range(2):
        losses = built.step(next(iter(built.loader.epoch(1))), steps + step)
    assert math.isfinite(float(losses["loss"])) and ("mixed" in losses) != built.step.mixer.replaces
    assert not torch.equal(before, first)


BAD = {
    "barlow has no soft targets; images can be mixed with simclr": ("barlow", "imix", {}),
    "swav with these options has no soft targets: set method.queue_size=0 and views.name=simclr": (
        "swav",
        "imix",
        {"method.queue_size": 16},
    ),
    "supcon with these options has no soft targets: set method.contrast_mode=all": (
        "supcon",
        "imix",
        {"method.contrast_mode": "one"},
    ),
    "dino with these options has no soft targets: set method.koleo_weight=0": (
        "dino",
        "imix",
        {"method.koleo_weight": 0.1},
    ),
    "mix.name = 'imx' is unknown: did you mean 'imix'?": ("simclr", "imx", {}),
    "mix imix has no setting 'alpa': did you mean 'alpha'?": ("simclr", "imix", {"mix.alpa": 1}),
    "mix.alpha = 0 must be a finite number above 0": ("simclr", "cutmix", {"mix.alpha": 0}),
    "mix.region = 1.5 is a probability": ("simclr", "unmix", {"mix.region": 1.5}),
    "mix.weight = -1 must be a finite": ("simclr", "mixco", {"mix.weight": -1}),
    "mix.temperature = 0.1: byol has no temperature": ("byol", "mixco", {"mix.temperature": 0.1}),
    "choose a multiple of 2 from 4 on, not 5": ("simclr", "mixco", {"context": 5, "batch_size": 10}),
    "choose a multiple of 2 from 4 on, not 2": ("simclr", "mixco", {"context": 2, "batch_size": 10}),
    "supcon compares a mixed view with another plain view": ("supcon", "imix", {"views.name": "plain"}),
    "mix.alpha is set, but there is no mix.name: imix": ("simclr", None, {"mix.alpha": 1}),
}


@pytest.mark.parametrize("message", BAD)
def test_invalid_combinations_are_refused(message: str) -> None:
    method, name, settings = BAD[message]
    fields = {key: settings[key] for key in ("context", "batch_size") if key in settings}
    rest = {key: value for key, value in settings.items() if key not in fields}
    with pytest.raises(ConfigError) as error:
        prepared(method, name, settings=rest, **fields)
    assert message in str(error.value)


def test_mixed_images_are_counted_as_views_of_the_step() -> None:
    """Memory and rows include the additional forward pass: half a view for each view with MixCo."""
    plain, halves = (estimate(prepared("simclr", mix, context=8)) for mix in (None, "mixco"))
    assert halves["rows"]["mixed.projection"][:2] == [2, 4] and halves["rows"]["projection"][:2] == [2, 8]
    ratio = (halves["memory_bytes_estimate"]["activations_of_a_group"]
             / plain["memory_bytes_estimate"]["activations_of_a_group"])  # fmt: skip
    assert 1.4 < ratio < 1.6
