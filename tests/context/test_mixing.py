"""Mixing: the vectors of the authors' code, every method's equation as loops, pure draws, groups, ranks and resume."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import small_methods as small
import torch
from golden_vectors import DTYPES, Case, unlabelled
from rank_pool import on_ranks
from small_methods import VARIANTS, create, literal, train
from small_runs import assert_same_state, saved, stop_after, tiny
from step_states import N, assert_same
from torch import Tensor

from inbatch import api
from inbatch.batch import MIXED, Batch, Mixture, Rows
from inbatch.context.mixing import MIXERS, Draw, IMix, MixCo, Mixer, UnMix
from inbatch.errors import ConfigError, Preempted
from inbatch.methods import METHODS
from inbatch.methods.base import Method
from inbatch.nn.functional import normalize
from inbatch.rng import fold
from inbatch.training.mixing import MIXING, StepMixing
from inbatch.training.summary import estimate

MIXABLE = [variant for variant in VARIANTS if create(variant).mixed_keys]


class Recorded:
    """A step whose draws are those that the authors' code made: {view: draw}."""

    def __init__(self, mixer: Mixer, method: Method, samples: int, draws: dict[int, Draw], views: int = 2) -> None:
        self.mixing = StepMixing(mixer, method, views, 0, 1, samples, False, draws)

    def images(self, view: int, rows: Tensor) -> Tensor:
        """Return rows (N, D) mixed as images of one pixel."""
        return self.mixing.images(view, 0, rows[..., None, None])[..., 0, 0]

    def loss(
        self, plain: Tensor | None, mixed: Tensor, target: Tensor | None = None, head: str = "projection"
    ) -> Tensor:
        rows: Rows = ({} if plain is None else {head: plain}) | {MIXED + head: mixed}
        batch = unlabelled(self.mixing.samples)
        return self.mixing.loss(rows, {} if target is None else {"projection": target}, batch)["loss"]


def permuted(case: Case) -> Draw:
    return Draw(case["perm"][None], torch.maximum(case["lam_raw"], 1 - case["lam_raw"])[None].double())


def moco(case: Case, dtype: torch.dtype, **options: object) -> Method:
    """Return MoCo with the queue of a vector."""
    width, size = case["queue0"].shape
    method = METHODS["moco"](case.options["temperature"], size, out_dim=width, **options)
    method.queue.to(dtype).rows.copy_(case["queue0"].T)
    return method


@DTYPES
@pytest.mark.parametrize("name", ["npair", "moco", "byol"])
def test_vectors_of_imix(golden: Path, name: str, dtype: torch.dtype) -> None:
    """The authors' BYOL has one direction, half of ours; keys carry gradient only without a target network."""
    case = Case(golden, f"imix__{name}", dtype)
    method: Method = METHODS["byol"]() if name == "byol" else METHODS["simclr"](case.options.get("temperature", 1.0))
    if name == "moco":
        method = moco(case, dtype)
    step = Recorded(IMix(), method, case.options["batch"], {0: permuted(case), 1: permuted(case)})
    case.check(step.images(0, case["x_q"]), "mixed")
    mixed, keys = case.leaf("mixed"), case.leaf("x_k")
    plain, target, head = keys[None], None, "projection"
    if name != "npair":
        plain, target, head = None, keys[None], "projection" if name == "moco" else "prediction"
    if name == "byol":  # the same in both directions
        loss = step.loss(None, torch.stack([mixed, mixed]), torch.stack([keys, keys]), head) / 2
    else:
        loss = step.loss(plain, mixed[None], target, head)
    case.check(loss, "loss")
    loss.backward()
    case.check(mixed.grad, "grad_mixed")
    if name == "npair":
        case.check(keys.grad, "grad_x_k")
    else:
        assert keys.grad is None
    if name == "moco":
        method.after_step({}, {"projection": keys.detach()[None]}, unlabelled(len(keys)), 0.0)
        case.check(method.queue.rows.T, "queue_after")


@DTYPES
def test_vectors_of_mixco_with_moco(golden: Path, dtype: torch.dtype) -> None:
    case = Case(golden, "mixco__moco", dtype)
    half = case.options["batch"] // 2
    draw = Draw(torch.arange(half, 2 * half)[None], case["lam"][None].double())
    mixer = MixCo(case.options["mix_param"], case.options["mix_temperature"])
    step = Recorded(mixer, moco(case, dtype), 2 * half, {0: draw})
    case.check(step.images(0, case["x_q"]), "mixed")
    q, k, mixed = case.leaf("x_q"), case.leaf("x_k"), case.leaf("mixed")
    loss = step.loss(q[None], mixed[None], k[None])
    case.check(loss, "loss")
    loss.backward()
    case.check(q.grad, "grad_x_q")
    case.check(mixed.grad, "grad_mixed")
    assert k.grad is None


@DTYPES
def test_vectors_of_mixco_with_simclr(golden: Path, dtype: torch.dtype) -> None:
    """Gradients are those of unit rows: the vectors' plain rows are normalised before."""
    case = Case(golden, "mixco__simclr", dtype)
    half = case.options["batch"] // 2
    draws = {v: Draw(torch.arange(half, 2 * half)[None], case[f"lam{v + 1}"][None].double()) for v in (0, 1)}
    method = METHODS["simclr"](case.options["temperature"])
    step = Recorded(MixCo(temperature=case.options["mix_temperature"]), method, 2 * half, draws)
    mixed = [case.leaf("mixed1"), case.leaf("mixed2")]
    for v in (0, 1):
        case.check(step.images(v, case[f"x{v + 1}"]), f"mixed{v + 1}")
    z = normalize(torch.stack([case["x1"], case["x2"]])).requires_grad_()
    loss = step.loss(z, torch.stack(mixed))
    case.check(loss, "loss")
    loss.backward()
    for v in (0, 1):
        case.check(mixed[v].grad, f"grad_mixed{v + 1}")
        # Normalising unit rows again removes the part of the gradient along the row.
        along = (case[f"grad_z{v + 1}"] * z[v].detach()).sum(-1, keepdim=True) * z[v].detach()
        torch.testing.assert_close(z.grad[v], case[f"grad_z{v + 1}"] - along, **case.tolerance)


@DTYPES
@pytest.mark.parametrize("name", ["one_way", "symmetric"])
def test_vectors_of_unmix(golden: Path, name: str, dtype: torch.dtype) -> None:
    case = Case(golden, f"unmix__{name}", dtype)
    n, symmetric = case.options["batch"], name == "symmetric"
    draw = Draw(torch.arange(n - 1, -1, -1)[None], case["lam"].double().expand(1, n))
    method = moco(case, dtype, symmetric=symmetric)
    step = Recorded(UnMix(), method, n, {0: draw})
    case.check(step.images(0, case["x1"]), "mixed")
    x1, x2, mixed = case.leaf("x1"), case.leaf("x2"), case.leaf("mixed")
    plain, keys = (
        (torch.stack([x1, x2]), torch.stack([x2, x1]).detach()) if symmetric else (x1[None], x2[None].detach())
    )
    loss = step.loss(plain, mixed[None], keys)
    case.check(loss, "loss")
    loss.backward()
    case.check(x1.grad, "grad_x1")
    case.check(mixed.grad, "grad_mixed")
    if symmetric:
        case.check(x2.grad, "grad_x2")
    # The queue receives the keys of view 1 first in the authors' symmetric code, those of view 2 first in ours.
    method.after_step({}, {"projection": keys.flip(0)}, unlabelled(n), 0.0)
    case.check(method.queue.rows.T, "queue_after")


# One sample of a mixed pair: the loss of query i with the key p as positive.


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def cross_entropy(logits: list[Tensor], p: int) -> Tensor:
    return -torch.stack(logits).log_softmax(0)[p]


def contrast(q: Tensor, k: Tensor, p: int, t: float, more: Tensor | None = None) -> Tensor:
    rows = [*unit(k), *([] if more is None else more)]
    return cross_entropy([unit(q) @ row / t for row in rows], p)


def of_moco(m: Method, q: Rows, k: Tensor, p: int, i: int, batch: Batch) -> Tensor:
    loss = contrast(q["projection"][i], k, p, m.temperature, m.queue.rows)
    row = unit(q["projection"][i])
    near = sorted(m.queue.rows, key=lambda x: -float((row @ x).detach()))[: m.neighbours]
    loss = loss + m.smooth * row @ (unit(k)[p] - sum(near) / len(near)) / m.temperature
    return loss * (2 if m.symmetric else 1)


def of_dcl(m: Method, q: Rows, k: Tensor, p: int, i: int, batch: Batch) -> Tensor:
    row = unit(q["projection"][i])
    negative = torch.stack([row @ x / m.temperature for j, x in enumerate(unit(k)) if j != p]).logsumexp(0)
    return negative - row @ unit(k)[p] / m.temperature


def of_supcon(m: Method, q: Rows, k: Tensor, p: int, i: int, batch: Batch) -> Tensor:
    label = batch.label.tolist()
    same = [j for j in range(len(k)) if j == p or (label[j] == label[p] and label[p] >= 0)]
    terms = [contrast(q["projection"][i], k, j, m.temperature) for j in same]
    return sum(terms) / len(terms) * m.temperature / m.base_temperature


def of_dino(m: Method, q: Rows, k: Tensor, p: int, i: int, batch: Batch) -> Tensor:
    target = ((k[p] - m.center) / m.teacher_temperatures[0]).softmax(0)
    return -(target * (q["prototypes"][i] / m.temperature).log_softmax(0)).sum()


def of_relation(m: Method, q: Rows, k: Tensor, p: int, i: int, batch: Batch) -> Tensor:
    rows = [*(unit(k) if m.candidates == "batch" else [unit(k)[p]]), *m.queue.rows]
    target = torch.stack([unit(k)[p] @ row / m.teacher_temperature for row in rows]).softmax(0)
    found = torch.stack([unit(q["projection"])[i] @ row / m.temperature for row in rows]).log_softmax(0)
    return -(target * found).sum()


LITERAL: dict[str, Callable[..., Tensor]] = {
    "simclr": lambda m, q, k, p, i, batch: contrast(q["projection"][i], k, p, m.temperature),
    "mocov3": lambda m, q, k, p, i, batch: 4 * m.temperature * contrast(q["prediction"][i], k, p, m.temperature),
    "byol": lambda m, q, k, p, i, batch: 2 * (unit(q["prediction"][i]) - unit(k)[p]).square().sum(),
    "simsiam": lambda m, q, k, p, i, batch: -unit(q["prediction"][i]) @ unit(k)[p],
    "moco": of_moco,
    "moco-smooth": of_moco,
    "moco-symmetric": of_moco,
    "dcl": of_dcl,
    "dino": of_dino,
    "supcon": of_supcon,
    "relation": of_relation,
    "relation-own": of_relation,
}
"""Variant -> loss of query i of the mixed rows with the key p."""


def some_rows(method: Method, seed: int = 0) -> tuple[Rows, Rows, Batch]:
    """Return rows of 4 mixed images, keys of 6 samples in one view, and the batch."""
    g = torch.Generator().manual_seed(seed)

    def draw(n: int, name: str) -> Tensor:
        width = {"prototypes": 6, "classifier": 3, "features": 12}.get(name, getattr(method, "out_dim", 12))
        return torch.randn(n, width, generator=g, dtype=torch.float64)

    query = {name: draw(4, name).requires_grad_() for name in method.online}
    keys = {name: draw(6, name)[None] for name in (method.target or method.online)}
    if getattr(method, "queue", None) is not None:
        method.queue.rows.copy_(unit(torch.randn(method.queue.rows.shape, generator=g, dtype=torch.float64)))
    return query, keys, Batch(torch.arange(6), torch.tensor([0, 1, 0, -1, 2, -1]))


def pairs(**options: object) -> Mixture:
    share = torch.tensor([0.9, 0.2, 0.5, 0.75], dtype=torch.float64)
    return Mixture(torch.tensor([[0, 1, 2, 3], [3, 2, 4, 5]]), torch.stack([share, 1 - share]), **options)


@pytest.mark.parametrize("variant", LITERAL)
def test_the_loss_of_mixed_rows_as_loops(variant: str) -> None:
    """Value and gradient: the mean over the images of share times the loss of each of the two samples."""
    method = create(variant).double()
    query, keys, batch = some_rows(method)
    mixture = pairs()
    found = method.mixed_loss(query, keys, mixture, batch)
    key = next(reversed(keys.values()))[0]
    expected = sum(
        mixture.weight[s, i] * LITERAL[variant](method, query, key, int(mixture.positive[s, i]), i, batch)
        for i in range(4) for s in range(2)
    ) / 4  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    head = method.online[0]
    slopes = [torch.autograd.grad(loss, query[head])[0] for loss in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)


def test_mixed_labels_are_counted_by_their_share() -> None:
    """Mixup: an unlabelled sample has no part in sum and count."""
    method = create("supervised")
    query, _, batch = some_rows(method)
    mixture, total, count = pairs(), 0.0, 0.0
    for i in range(4):
        for s in range(2):
            label, share = int(batch.label[mixture.positive[s, i]]), float(mixture.weight[s, i])
            if label >= 0:
                total, count = total - share * query["classifier"][i].log_softmax(0)[label], count + share
    torch.testing.assert_close(method.mixed_loss(query, {}, mixture, batch), total / count)


@pytest.mark.parametrize("variant", ["moco", "moco-symmetric", "mocov3", "byol", "simsiam", "dino", "relation",
                                     "relation-own", "supervised"])  # fmt: skip
def test_a_sample_mixed_with_itself_is_a_plain_one(variant: str) -> None:
    """The scale of the loss is that of plain rows. SimCLR, DCL and SupCon also have negatives of the same view."""
    method, n = create(variant).double(), 6
    _, keys, batch = some_rows(method)
    other = some_rows(method, 1)[1]
    own = torch.arange(n).expand(2, n)
    mixture = Mixture(own, torch.full((2, n), 0.5, dtype=torch.float64), "own")
    rows = {name: torch.randn(2, n, x.shape[1], dtype=torch.float64) for name, x in some_rows(method)[0].items()}
    views = list(method.online_views(2))
    target = {name: torch.cat([x, other[name]])[list(method.target_views(2))] for name, x in keys.items()}
    source = target if method.target else rows
    key_views = list(method.target_views(2)) if method.target else [0, 1]
    losses = []
    for i, v in enumerate(views):
        chosen = [j for j, w in enumerate(key_views) if (w == v) == (method.mixed_keys == "same")]
        query = {name: x[i] for name, x in rows.items()}
        losses.append(method.mixed_loss(query, {name: x[chosen] for name, x in source.items()}, mixture, batch))
    plain = method.loss({name: x[: len(views)] for name, x in rows.items()}, target, batch)["loss"]
    torch.testing.assert_close(torch.stack(losses).mean(), plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MIXERS)
def test_draws_are_pure_functions_of_key_and_place(name: str) -> None:
    """Every group is mixed within itself; its draws do not depend on the other groups, but on the key."""
    mixer, places = MIXERS[name](), torch.arange(24).view(3, 8)
    found, again, other = (mixer.draw(key, places, (5, 7)) for key in (4, 4, 5))
    size = mixer.size(8)
    assert found.partner.shape == found.share.shape == (3, size)
    for a, b in zip(vars(found).values(), vars(again).values(), strict=True):
        assert a is b is None or torch.equal(a, b)
    assert not torch.equal(found.share, other.share)
    single = mixer.draw(4, places[1:2], (5, 7))
    assert torch.equal(single.partner[0], found.partner[1]) and torch.equal(single.share[0], found.share[1])
    for partner in found.partner:
        assert sorted(partner.tolist()) == list(range(8 - size, 8))
    assert ((found.share >= (0.5 if name == "imix" else 0)) & (found.share <= 1)).all()
    assert (len(found.share.unique()) == 1) == (name == "unmix")


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


@functools.cache
def expected(variant: str, plugs: str, groups: int) -> dict[str, list]:
    return literal(variant, N, groups, plugs=plugs_of(plugs))


PAIRS = [(variant, name) for variant in MIXABLE for name in MIXERS]
PAIRS += [(variant, f"{name} {more}") for name in MIXERS for more in ("set", "ba2m shuffle curate")
          for variant in ("simclr", "byol", "moco", "supervised")]  # fmt: skip


@pytest.mark.grid(6)
@pytest.mark.parametrize(("variant", "plugs"), PAIRS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_equal_plain_autograd(variant: str, plugs: str, groups: int) -> None:
    assert_same(train(variant, N, groups, plugs=plugs_of(plugs)), expected(variant, plugs, groups))


def train_one(variant: str, plugs: str, groups: int, synced: bool, dropout: float) -> dict:
    small.DROPOUT = dropout
    return train(variant, N, groups, synced=synced, plugs=plugs_of(plugs))


@pytest.mark.grid(1)
@pytest.mark.parametrize(("variant", "plugs"), PAIRS)
@pytest.mark.parametrize(("world", "groups"), [(2, 1), (2, 2)])
def test_ranks_equal_plain_autograd(variant: str, plugs: str, world: int, groups: int) -> None:
    for found in on_ranks(world, train_one, variant, plugs, groups, False, 0.2):
        assert_same(found, expected(variant, plugs, world * groups))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["simclr", "byol", "moco-symmetric", "relation"])
@pytest.mark.parametrize("name", MIXERS)
def test_a_group_over_two_ranks_is_one_group(variant: str, name: str) -> None:
    whole = on_ranks(1, train_one, variant, name, 1, True, 0.0)[0]
    for found in on_ranks(2, train_one, variant, name, 1, True, 0.0):
        assert_same(found, whole)


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


def test_a_step_mixes_by_its_number_only() -> None:
    """Mixed images and targets are the same, whichever steps were made before, and others at another step."""
    method, x = create("simclr"), torch.randn(8, 3, 5, 5, dtype=torch.float64)

    def mixed(step: int) -> list[Tensor]:
        made = StepMixing(IMix(), method, 2, fold(3, step, MIXING), 2, 8, False)
        images = [made.images(0, g, x[4 * g : 4 * g + 4]) for g in (1, 0)]
        return [*images, made.mixture(0, x).positive, made.mixture(0, x).weight]

    one, _, again, other = (mixed(step) for step in (7, 8, 7, 9))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one[:2], other[:2], strict=True))


def prepared(method: str, name: str, **fields: object) -> api.RunComponents:
    options = {f"method.{k}": v for k, v in small.SMALL.get(method, {}).items() if k != "num_classes"}
    given = {"subset": 40, "batch_size": 8, "context": 4, "epochs": 2, "device": "cpu", "mix": name} | fields
    return api.prepare("digits-canvas", method, settings=options | given.pop("settings", {}), **given)


@pytest.mark.grid(2)
@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("method", [name for name, made in METHODS.items() if made.mixed_keys and not made.teacher])
@pytest.mark.parametrize("more", [{}, {"fuse": "set"}, {"attend": "batchformer"}, {"shuffle_groups": True},
                                  {"settings": {"curate.name": "redraw", "curate.warmup": 0.0}}])  # fmt: skip
def test_every_method_with_soft_targets_trains(method: str, name: str, more: dict) -> None:
    built = prepared(method, name, **more)
    first, steps = next(built.network.parameters()), built.loader.steps
    before = first.detach().clone()
    for step in range(2):
        losses = built.step(next(iter(built.loader.epoch(1))), steps + step)
    assert math.isfinite(float(losses["loss"])) and ("mixed" in losses) != built.step.mixer.replaces
    assert not torch.equal(before, first)


BAD = {
    "vicreg has no soft targets; images can be mixed with simclr": ("vicreg", "imix", {}),
    "supcon with these options has no soft targets": ("supcon", "imix", {"method.contrast_mode": "one"}),
    "dino with these options has no soft targets": ("dino", "imix", {"method.koleo_weight": 0.1}),
    "exclude each other": ("simclr", "imix", {"negatives.name": "hard"}),
    "mix.name = 'imx' is unknown: did you mean 'imix'?": ("simclr", "imx", {}),
    "mix imix has no setting 'alpa': did you mean 'alpha'?": ("simclr", "imix", {"mix.alpa": 1}),
    "mix.alpha = 0 must be a finite number above 0": ("simclr", "cutmix", {"mix.alpha": 0}),
    "mix.region = 1.5 is a probability": ("simclr", "unmix", {"mix.region": 1.5}),
    "mix.weight = -1 must be a finite": ("simclr", "mixco", {"mix.weight": -1}),
    "mix.temperature = 0.1: byol has no temperature": ("byol", "mixco", {"mix.temperature": 0.1}),
    "into halves: 5 is not a multiple of 2": ("simclr", "mixco", {"context": 5, "batch_size": 10}),
    "supcon compares a mixed view with another plain view": ("supcon", "imix", {"views.name": "plain"}),
    "mix.alpha is set, but there is no mix.name: imix": ("simclr", None, {"mix.alpha": 1}),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_mixed_is_refused(message: str) -> None:
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
