"""The check of a method: all tests, and their report."""

import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from inbatch.batch import loss_fault
from inbatch.errors import ConfigError, InbatchError, check_whole, listed, reason
from inbatch.methods.base import Method, check_heads, check_widths
from inbatch.runtime.isolation import usual_state
from inbatch.testing import equation, training
from inbatch.testing.derivative import derivative
from inbatch.testing.memory import trainable
from inbatch.testing.rank_free import rank_free
from inbatch.testing.ranks import ranks as two_ranks
from inbatch.testing.report import Finding, MethodError, Report
from inbatch.testing.trial import WIDTH, Trial
from inbatch.training.renamed_keys import check_not_renamed

Test = Callable[[Trial], Finding]
_ALONE: tuple[Test, ...] = (
    equation.purity, equation.constancy, equation.randomness, rank_free, equation.labels, equation.order,
    equation.finite, derivative,
)  # fmt: skip
_STEPS: tuple[Test, ...] = (
    training.memory, training.saved_state, training.resume, training.repeat, training.groups, two_ranks,
)  # fmt: skip
_IMPLIED: dict[Test, set[Test]] = {
    equation.purity: {equation.constancy, training.memory},
    equation.constancy: {
        equation.randomness,
        rank_free,
        equation.labels,
        equation.order,
        derivative,
        training.resume,
        training.repeat,
        training.groups,
        two_ranks,
    },
    equation.randomness: {equation.order, training.resume, training.repeat, training.groups, two_ranks},
}
"""Test -> tests that would fail for the same reason."""
_KIND = {"constancy": "value", "randomness": "random", "rank_free": "ranks", "derivative": "gradient",
    "saved_state": "state", "ranks": "two ranks"}  # fmt: skip


def check_method(
    method: type[Method], *, batch_size: int = 16, num_views: int | None = None, any_order: bool = True,
    processes: bool = True, raise_errors: bool = True, **options: Any,
) -> Report:  # fmt: skip
    """Test whether a method keeps the rules that make ranks, context groups and resumed runs exact.

    The tests train a small network on noise, in seconds: the loss is pure, memory changes after the optimiser only and
    is saved, context groups and ranks give the step of plain autograd, gradients are right and finite. They do not test
    whether the method learns. Options that keep the method small (a short queue) keep the check fast.

    Args:
        method: the class.
        batch_size: samples of the batch; raise it for a method that needs more.
        num_views: views of a sample; by default the smallest number of at least 2 that the method allows.
        any_order: whether the loss is to be independent of the order of the samples.
        processes: whether to run two ranks in processes of their own, too.
        raise_errors: raise MethodError, with a sentence for every failure, unless all tests pass.
        **options: options of the method's constructor.

    Returns:
        The report.

    Raises:
        MethodError: an AssertionError, if a test fails and `raise_errors` is True.
        ConfigError: if `method` is not a subclass of inbatch.methods.base.Method, or has no such option.
    """
    if not (inspect.isclass(method) and issubclass(method, Method)):
        raise ConfigError(f"check_method takes a subclass of inbatch.methods.base.Method, not {method!r:.80}")
    check_whole("batch_size", batch_size, 4)
    if num_views is not None:
        check_whole("num_views", num_views, 1)
    if batch_size % 2:
        raise ConfigError(f"batch_size = {batch_size}: two ranks and two context groups need an even number")
    known = inspect.signature(method).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in known) and (unknown := sorted(set(options) - {p.name for p in known})):
        check_not_renamed(f"method.{unknown[0]}", method.__name__, {p.name for p in known})
        names = ", ".join(p.name for p in known) or "none"
        raise ConfigError(f"{method.__name__} has no option {unknown[0]!r}; there are {names}")
    report = _report(method, options, batch_size, num_views or 0, any_order, processes)
    if raise_errors and not report.passed:
        raise MethodError(report)
    return report


@usual_state()
def _report(
    method: type[Method], options: dict[str, Any], batch: int, views: int, any_order: bool, processes: bool
) -> Report:
    trial, skipped = Trial(method, options, batch, views), set[Test]()
    skipped |= {equation.order} if not any_order else set()
    skipped |= {two_ranks} if not processes else set()
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # extreme rows and small batches
        findings = list(_findings(trial, skipped))
    return Report(method.__name__, options, findings)


def _findings(trial: Trial, skipped: set[Test]) -> Iterator[Finding]:
    """Yield all findings; end early if the method cannot be made, or its loss cannot be computed."""
    yield _options(trial)
    first = _attempt(_heads, trial)
    yield first
    if not first.passed:
        return
    yield _attempt(_parameters, trial)
    first_tests: tuple[Test, ...] = (_loss, equation.rows)
    for test in first_tests:
        yield (finding := _attempt(test, trial))
        if not finding.passed:
            return
    failures = set[str]()
    for test in (*_ALONE, *_STEPS):
        if test not in skipped:
            finding = _attempt(test, trial)
            if finding.sentence not in failures:  # an exception of a hook ends several tests
                yield finding
            if finding.passed is False:
                failures.add(finding.sentence)
                skipped |= _IMPLIED.get(test, set())


def _attempt(test: Test, trial: Trial) -> Finding:
    """Return the finding of a test; an exception of the method is a failure."""
    name = test.__name__.lstrip("_")
    try:
        return test(trial)
    except Exception as error:
        text = str(error) if isinstance(error, InbatchError) else reason(error)
        return Finding(_KIND.get(name, name), False, f"the method raises an error in this test: {text}")


def _options(trial: Trial) -> Finding:
    """Test that options have defaults and are values of JSON, because a recipe stores them."""

    def fails(sentence: str) -> Finding:
        return Finding("options", False, sentence)

    known = list(inspect.signature(trial.make).parameters.values())
    if trial.make.__init__ is torch.nn.Module.__init__:
        return fails(
            "the class has no constructor, and that of torch.nn.Module takes any options: define __init__(self)"
        )
    if free := [p.name for p in known if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]:
        return fails(f"the constructor takes any options ({listed(free)}): name them, so that typos are errors")
    if unset := [p.name for p in known if p.default is p.empty and p.name not in trial.options]:
        return fails(f"the options {listed(unset)} have no default: give them one, or pass them to the check")
    for name, value in ({p.name: p.default for p in known if p.default is not p.empty} | trial.options).items():
        try:
            same = _plain(json.loads(json.dumps(value, allow_nan=False))) == _plain(value)
        except (TypeError, ValueError):
            same = False
        if not same:
            return fails(f"{name} = {value!r:.60} is not a value of JSON, and a recipe cannot store it: use numbers, "
                         "text, booleans, None or lists, and make objects of them in the constructor")  # fmt: skip
    return Finding("options", True, "options have defaults and can be stored as JSON")


def _plain(value: Any) -> Any:
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value


def _heads(trial: Trial) -> Finding:
    """Test that the method can be made, and that its heads and views fit each other."""

    def fails(sentence: str) -> Finding:
        return Finding("heads", False, sentence)

    method, heads = trial.method()
    try:
        check_heads(method, heads, trial.views(method))
        check_widths(heads, WIDTH)
    except ValueError as error:
        return fails(str(error))
    if method.target and not method.teacher:  # a teacher never changes
        momenta = [method.target_momentum(progress / 4) for progress in range(5)]
        if not all(0 <= momentum <= 1 for momentum in momenta):
            return fails(f"target_momentum returns {momenta}: the momentum of the target network is from 0 to 1")
    trial.parts()
    return Finding("heads", True, "heads and views fit each other")


def _parameters(trial: Trial) -> Finding:
    """Test that no trainable parameter is in the method."""
    if names := trainable(trial.method()[0]):
        return Finding("parameters", False, f"the method holds trainable parameters ({listed(names)}): no optimiser "
                       "reaches them, and gradient caching passes gradients to rows only. Move them to a head: "
                       "heads() returns {name: Head(module, source)}, and the loss reads its rows")  # fmt: skip
    return Finding("parameters", True, "all trainable parameters are in heads")


def _loss(trial: Trial) -> Finding:
    """Test that the loss is a dict of scalars with a finite "loss"."""
    method, online, target, batch = trial.rows()
    leaves = {name: x.clone().requires_grad_() for name, x in online.items()}
    try:
        losses: Any = method.loss(leaves, target, batch)
    except RuntimeError as error:
        if "in-place operation" not in str(error):
            raise
        return equation.rows(trial)
    if fault := loss_fault(losses, dict(method.named_buffers())):
        return Finding("loss", False, fault)
    if not bool(losses["loss"].isfinite()):
        return Finding("loss", False, f"the loss of random rows is {float(losses['loss']):.4g}")
    return Finding("loss", True, "the loss is a finite scalar")
