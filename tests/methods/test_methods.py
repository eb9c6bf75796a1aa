"""Interface of every registered method; a method added to METHODS is tested automatically."""

import copy
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import small_methods as small
import torch
from small_methods import SMALL, VARIANTS, create
from torch import Tensor, nn

from inbatch.batch import Batch, Losses, Rows, split_state
from inbatch.errors import ConfigError
from inbatch.losses import info_nce
from inbatch.methods import METHODS
from inbatch.methods.base import Method
from inbatch.nn.functional import normalize

N = 8
EVERY = pytest.mark.parametrize("variant", VARIANTS)


def rows(variant: str, order: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Rows, Rows, Batch]:
    """Return online rows, target rows and batch, as the networks compute them from the views in some order."""
    method, network, target = small.parts(variant)
    batch, images = next(small.batches(N, 1, small.views_of(variant)))
    images = order(torch.stack(images))
    network.eval()
    with torch.no_grad():
        online = network([images[v] for v in method.online_views(len(images))])
        target_rows = target.eval()([images[v] for v in method.target_views(len(images))]) if target else {}
    return online, target_rows, batch


def learnable(online: Rows) -> Rows:
    return {name: x.clone().requires_grad_() for name, x in online.items()}


def gradients(leaves: Rows) -> Rows:
    """Return the gradients of the rows; zero for rows that the loss did not use, as in a step."""
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}


def memory(method: Method) -> dict[str, Tensor]:
    return copy.deepcopy(method.state_dict())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@EVERY
def test_method_has_the_heads_that_it_reads(variant: str) -> None:
    method = create(variant)
    heads = method.heads(12)
    assert method.online and set(method.online) - {"features"} <= set(heads)
    assert set(method.target) - {"features"} <= {name for name, head in heads.items() if not head.online_only}
    sources = {"features"}
    for name, head in heads.items():
        assert head.source in sources
        sources.add(name)


@EVERY
def test_methods_have_no_trainable_parameters(variant: str) -> None:
    assert list(create(variant).parameters()) == []


@pytest.mark.grid(24)
@EVERY
def test_the_loss_is_pure(variant: str) -> None:
    """Two calls give the same value and gradient, with and without a graph, and change no state."""
    online, target, batch = rows(variant)
    method = create(variant).double()
    start, copies = memory(method), copy.deepcopy((online, target, batch))
    results = []
    for _ in range(2):
        leaves = learnable(online)
        losses = method.loss(leaves, target, batch)
        losses["loss"].backward()
        assert losses["loss"].shape == ()
        results.append(({k: x.detach() for k, x in losses.items()}, gradients(leaves)))
    (first, gradient), (second, again) = results
    assert same(first, second) and same(gradient, again) and same(memory(method), start)
    assert same(method.loss(online, target, batch), first)
    assert same(online, copies[0]) and same(target, copies[1]) and torch.equal(batch.label, copies[2].label)


@pytest.mark.grid(24)
@EVERY
def test_the_order_of_samples_does_not_matter(variant: str) -> None:
    online, target, batch = rows(variant)
    method = create(variant).double()
    order = torch.randperm(N)
    moved = [{name: x[:, order] for name, x in outputs.items()} for outputs in (online, target)]
    losses = method.loss(*moved, Batch(batch.index[order], batch.label[order]))
    for name, expected in method.loss(online, target, batch).items():
        torch.testing.assert_close(losses[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["simclr", "moco-symmetric", "supcon", "barlow-3", "vicreg-3", "wmse-4"])
def test_swapped_views_give_the_same_loss_if_the_equation_is_symmetric(variant: str) -> None:
    method = create(variant).double()
    first, second = (method.loss(*rows(variant, order))["loss"] for order in (lambda x: x, lambda x: x.flip(0)))
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


@pytest.mark.grid(8)
@EVERY
def test_memory_changes_after_the_optimiser_and_never_before(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In real steps: the loss uses the memory of the step before, `on_weights` gets new weights."""
    method, network, target = small.parts(variant)
    seen: list[tuple[str, dict[str, Tensor], Tensor]] = []
    loss, on_weights, after_step = method.loss, method.on_weights, method.after_step

    def weights() -> Tensor:
        return nn.utils.parameters_to_vector([*network.parameters(), *(target.parameters() if target else [])]).detach()

    def watched_loss(*arguments: Any) -> Losses:
        seen.append(("loss", memory(method), weights()))
        return loss(*arguments)

    def watched_on_weights(*arguments: Any) -> None:
        seen.append(("before", memory(method), weights()))
        on_weights(*arguments)

    def watched_after_step(*arguments: Any) -> None:
        after_step(*arguments)
        seen.append(("after", memory(method), weights()))

    monkeypatch.setattr(method, "loss", watched_loss)
    monkeypatch.setattr(method, "on_weights", watched_on_weights)
    monkeypatch.setattr(method, "after_step", watched_after_step)
    monkeypatch.setattr(small, "parts", lambda *_: (method, network, target))
    seen.append(("after", memory(method), weights()))
    small.train(variant, N, 2, steps=3)

    assert [what for what, _, _ in seen] == ["after"] + ["loss", "before", "after"] * 3
    for previous, at_loss, before, after in zip(seen[:-1:3], seen[1::3], seen[2::3], seen[3::3], strict=True):
        assert same(at_loss[1], previous[1]) and same(before[1], previous[1])
        assert not method.state_dict() or not same(after[1], before[1])
        assert torch.equal(at_loss[2], previous[2]) and not torch.equal(before[2], at_loss[2])


@pytest.mark.grid(10)
@EVERY
def test_state_of_a_method_is_complete(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new method that loads the state of a trained one gives the same loss, also after the next step."""
    trained = small.parts(variant)
    with monkeypatch.context() as patch:
        patch.setattr(small, "parts", lambda *_: trained)
        small.train(variant, N, 1)
    file = io.BytesIO()
    torch.save(trained[0].state_dict(), file)
    file.seek(0)
    method, loaded = trained[0], create(variant).double()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    arguments = rows(variant)
    for step in range(2):
        assert same(loaded.loss(*arguments), method.loss(*arguments))
        for m in (method, loaded):
            m.store(split_state(m.loss(*arguments))[1])
            m.after_step(*arguments, step / 2)
        assert same(loaded.state_dict(), method.state_dict())


KINDS = {
    "random": lambda x: x,
    "zero": torch.zeros_like,
    "constant": torch.ones_like,
    "large": lambda x: (x * 1e4).clamp(-6e4, 6e4),
}


@pytest.mark.grid(30)
@EVERY
@pytest.mark.filterwarnings("ignore:features depend on each other")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_rows_have_finite_loss_and_gradient(variant: str, kind: str, dtype: torch.dtype) -> None:
    online, target, batch = rows(variant)
    online, target = ({name: KINDS[kind](x).to(dtype) for name, x in outputs.items()} for outputs in (online, target))
    options = inspect.signature(METHODS[VARIANTS[variant][0]]).parameters
    coldest = {name: 0.01 for name in ("temperature", "tau_min") if name in options}
    steep = variant.startswith("vicreg") and kind == "large"  # the gradient grows with the cube of the rows
    steep |= "koleo" in variant and kind == "zero"  # and with the inverse of their distances
    if steep and dtype == torch.float16:
        online = {name: x.float() for name, x in online.items()}
    method, leaves = create(variant, **coldest), learnable(online)
    loss = method.loss(leaves, target, batch)["loss"]
    loss.backward()
    assert loss.isfinite() and all(x.isfinite().all() for x in gradients(leaves).values())


@pytest.mark.grid(20)
@EVERY
def test_a_batch_without_a_known_label_has_a_finite_loss(variant: str) -> None:
    online, target, batch = rows(variant)
    leaves = learnable(online)
    loss = create(variant).double().loss(leaves, target, Batch(batch.index, torch.full_like(batch.label, -1)))["loss"]
    loss.backward()
    assert loss.isfinite() and all(x.isfinite().all() for x in gradients(leaves).values())


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.target])
def test_momentum_is_a_share(name: str) -> None:
    method = METHODS[name](**SMALL.get(name, {}))
    assert all(0 <= method.target_momentum(progress / 10) <= 1 for progress in range(11))


def test_moco_reads_the_queue_before_it_pushes() -> None:
    """A key among its own negatives would cost at least log 2."""
    method = METHODS["moco"](temperature=0.01, queue_size=40, out_dim=8)
    keys = {"projection": torch.eye(8)[None]}
    arguments = keys, keys, Batch(torch.arange(8), torch.arange(8))
    method.queue.rows.copy_(-torch.ones(8).expand(40, 8) / 8**0.5)
    assert method.loss(*arguments)["loss"] < 1e-6
    method.after_step(*arguments, 0.0)
    assert method.loss(*arguments)["loss"] > 0.69
    assert torch.equal(method.queue.rows[:8], torch.eye(8)) and method.queue.filled == 8


def test_moco_learns_from_one_view_or_adds_both_directions() -> None:
    plain, symmetric = (METHODS["moco"](queue_size=40, out_dim=8, symmetric=s) for s in (False, True))
    assert (plain.online_views(2), plain.target_views(2)) == ((0,), (1,))
    (q0, q1), (k0, k1) = torch.randn(2, 2, N, 8)
    batch = Batch(torch.arange(N), torch.full((N,), -1))
    pick = {"projection": torch.stack([q0, q1])}, {"projection": torch.stack([k1, k0])}
    assert (symmetric.online_views(2), symmetric.target_views(2)) == ((0, 1), (1, 0))
    bank, t = symmetric.queue.rows, symmetric.temperature
    torch.testing.assert_close(
        symmetric.loss(*pick, batch)["loss"], info_nce(q0, k1, bank, t) + info_nce(q1, k0, bank, t)
    )
    symmetric.after_step(*pick, batch, 0.0)
    assert symmetric.queue.filled == 2 * N
    assert torch.equal(symmetric.queue.rows[: 2 * N], normalize(torch.cat([k1, k0])))


def test_supervised_needs_to_know_its_classes() -> None:
    with pytest.raises(ValueError, match="number of classes"):
        METHODS["supervised"]().heads(12)


def test_supervised_accuracy_counts_labelled_samples() -> None:
    logits = torch.eye(3)[[0, 1, 2, 0]].expand(2, 4, 3)
    batch = Batch(torch.arange(4), torch.tensor([0, 2, -1, 0]))
    assert METHODS["supervised"](3).loss({"classifier": logits}, {}, batch)["accuracy"] == pytest.approx(2 / 3)


def test_memory_bank_longer_than_the_data_set_is_noted() -> None:
    for name, options in (("moco", {}), ("nnclr", {}), ("pcl", {}), ("swav", {"num_prototypes": 4})):
        longer = METHODS[name](queue_size=40, **options).notes(39)
        assert "40 rows, more than the 39 images" in longer[0] and "method.queue_size to 39" in longer[0]
        assert METHODS[name](queue_size=40, **options).notes(40) == []
    assert METHODS["simclr"]().notes(2) == []


def test_a_head_without_layers_or_width_is_refused() -> None:
    """0 of an option must not mean another value than was typed."""
    sizes = {"layers", "hidden_dim", "out_dim", "pred_hidden_dim", "bottleneck_dim"}
    for name, kind in METHODS.items():
        options = sizes & set(inspect.signature(kind).parameters)
        for option in options:
            with_hidden = {"layers": 2} if "layers" in options else {}
            with pytest.raises((ValueError, ConfigError), match=r"at least 1|above 0|positive"):
                create(name, **with_hidden | {option: 0})
                pytest.fail(f"{name} takes {option}=0")


@pytest.mark.parametrize(
    ("method", "option", "value", "words"),
    [
        ("pcl", "restarts", 0, "restarts must be at least 1, not 0"),
        ("pcl", "iterations", 0, "iterations must be at least 1, not 0"),
        ("pcl", "num_clusters", (), "clusterings must be at least 1, not 0"),
        ("pcl", "negatives", -1, "negatives must be at least 0, not -1"),
        ("pcl", "alpha", -1.0, "alpha must be at least 0, not -1"),
        ("swav", "iterations", 0, "iterations must be at least 1, not 0"),
        ("swav", "num_prototypes", 1, "num_prototypes must be at least 2, not 1"),
        ("dino", "num_prototypes", 0, "num_prototypes must be at least 2, not 0"),
        ("wmse", "w_iter", 0, "w_iter must be at least 1, not 0"),
        ("wmse", "w_size", 0, "w_size must be at least 1, not 0"),
        ("wmse", "eps", 2.0, "eps must be from 0 to 1, not 2"),
        ("supervised", "label_smoothing", 2.0, "label_smoothing must be from 0 to 1, not 2"),
    ],
)
def test_options_that_fail_in_a_later_step_are_refused_at_once(
    method: str, option: str, value: Any, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        METHODS[method](**{option: value}).heads(12)
