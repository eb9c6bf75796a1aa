"""`check_method`: our methods pass, and each wrong method fails with the sentence that names its fault."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import wrong_methods as wrong
from rank_pool import on_ranks
from small_methods import SMALL
from unusual_methods import UNUSUAL, OwnBackward, Taught

import inbatch
from inbatch.errors import ConfigError
from inbatch.methods import METHODS
from inbatch.methods.base import Method
from inbatch.testing import MethodError, check, check_method, equation, ranks, training
from inbatch.testing.derivative import derivative
from inbatch.testing.rank_free import rank_free
from inbatch.testing.report import Finding
from inbatch.testing.trial import Trial

WRONG: dict[type[Method], tuple[Callable[[Trial], Finding], str]] = {
    wrong.QueueInLoss: (equation.purity, "loss changes the buffers queue.filled, queue.pointer, queue.rows: move that"),
    wrong.TakesItsPart: (rank_free, "loss depends on the rank .* must not take a rank's part"),
    wrong.LocalStatistic: (training.groups, "2 context groups differs .* in network.heads.*centre: heads run twice"),
    wrong.CountsInAttribute: (training.saved_state, r"training changes steps, which state_dict\(\) does not hold"),
    wrong.KeepsInClass: (training.saved_state, r"training changes KeepsInClass.past"),
    wrong.Learns: (check._parameters, r"trainable parameters \(log_temperature\)"),
    wrong.LearnsUnseen: (check._parameters, r"trainable parameters \(scales\)"),
    wrong.Draws: (equation.randomness, "loss draws random numbers from a global generator.*inbatch.rng.uniform"),
    wrong.ReadsRank: (rank_free, "loss depends on the rank"),
    wrong.Adds: (rank_free, "torch.distributed.all_reduce: its rows are those of the whole batch"),
    wrong.OverwritesRows: (check._loss, "loss overwrites its arguments"),
    wrong.OverwritesTarget: (equation.rows, "loss overwrites its arguments"),
    wrong.LosesGradient: (derivative, "the gradient is not the derivative of the loss"),
    wrong.ReadsLabels: (equation.labels, "reads batch.label, but the class does not say so: set labels = True"),
    wrong.DependsOnOrder: (equation.order, "depends on the order of the samples"),
    wrong.Divides: (equation.finite, "is not finite for rows that are all zero: guard divisions"),
    wrong.RemembersEarly: (training.memory, "on_gradients changes queue.filled.*only after_step"),
    wrong.NeedsObject: (check._options, "kernel = <.*cosine_similarity.*not a value of JSON"),
    wrong.DrawsWithoutSeed: (equation.constancy, "a second call of loss gives another value"),
    wrong.PerturbsWeights: (equation.randomness, "another hook, a head or the constructor draws random numbers"),
    wrong.RegistersLate: (training.resume, 'cannot be loaded .*"centre".*: make every buffer'),
    wrong.StopsGradient: (check._loss, "the loss carries no gradient"),
    wrong.MisnamesState: (check._loss, "'state.center', which is not the next value of a buffer"),
    wrong.StateWithGraph: (check._loss, "'state.lengths' with its graph"),
    wrong.StatePerPlace: (equation.order, "next value of lengths depends on the order"),
    wrong.HasNoConstructor: (check._options, r"define __init__\(self\)"),
    wrong.ReturnsTensor: (check._loss, "loss returns Tensor: return a dict"),
}
TESTS = (check._heads, check._parameters, check._loss, equation.rows, *check._ALONE, *check._STEPS[:-1])


def test_each_fault_is_named() -> None:
    for method, (test, sentence) in WRONG.items():
        finding = test(Trial(method))
        assert finding.passed is False and re.search(sentence, finding.sentence), (method.__name__, finding)
        wrong.KeepsInClass.past.clear()


def test_a_right_method_passes_and_the_report_is_plain() -> None:
    report = check_method(wrong.Right, processes=False, temperature=0.3)
    assert report.passed and not report.failures and report.options == {"temperature": 0.3}
    assert len({finding.kind for finding in report.findings}) == len(report.findings) == 18
    assert json.loads(json.dumps(report.json()))["passed"] is True
    assert "value (ok): a second call" in str(report)


@pytest.mark.slow
def test_tests_of_the_loss_pass_for_methods_with_memory_and_a_stop_gradient() -> None:
    for name in ("moco", "simsiam"):
        trial = Trial(METHODS[name], dict(SMALL[name]))
        for test in (check._heads, check._parameters, check._loss, equation.rows, *check._ALONE):
            assert (finding := test(trial)).passed, (name, finding)


def test_unusual_methods_pass_the_tests_of_the_loss() -> None:
    for method in UNUSUAL:
        for test in (check._loss, equation.order, derivative):
            assert (finding := test(Trial(method))).passed, (method.__name__, finding)


def test_a_method_with_a_teacher_needs_no_momentum() -> None:
    for test in (check._heads, training.groups):
        assert (finding := test(Trial(Taught))).passed, finding


def test_two_computations_without_gradient_are_held_constant_in_turn() -> None:
    """KoLeo looks for the nearest rows of each view: the second search was given what the first had computed."""
    finding = derivative(Trial(METHODS["dino"], SMALL["dino"] | {"koleo_weight": 0.5}))
    assert finding.passed, finding


def test_a_wrong_backward_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnBackward.length, "backward", lambda ctx, g: ctx.saved_tensors[0] * g[..., None])
    finding = derivative(Trial(OwnBackward))
    assert finding.passed is False and "not the derivative of the loss" in finding.sentence


def test_one_fault_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_ALONE", (equation.constancy, equation.labels, rank_free))
    report = check_method(wrong.DrawsWithoutSeed, processes=False, raise_errors=False)
    assert [finding.kind for finding in report.failures] == ["value"]
    monkeypatch.setattr(check, "_ALONE", ())
    report = check_method(wrong.FailsInHook, processes=False, raise_errors=False)
    assert len(report.failures) == 1 and "RuntimeError: broken" in report.failures[0].sentence


def test_failures_raise_an_assertion_with_all_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_STEPS", ())
    with pytest.raises(MethodError, match=r"(?s)QueueInLoss fails 1 of .*- purity: loss changes the buffers") as caught:
        check_method(wrong.QueueInLoss, processes=False)
    assert isinstance(caught.value, AssertionError) and not caught.value.report.passed


def rank_states(trial: Trial) -> dict[str, Any]:
    return {name: x.tolist() for name, x in trial.train(trial.parts()).items()}


def test_a_statistic_of_local_rows_differs_between_real_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same comparison as with processes of their own, which the slow tests start."""
    import torch

    def states(trial: Trial) -> list[dict[str, torch.Tensor]]:
        results = on_ranks(2, rank_states, trial)
        exact = {n: x.dtype for n, x in trial.train(trial.parts()).items()}
        return [{name: torch.tensor(x, dtype=exact[name]) for name, x in state.items()} for state in results]

    monkeypatch.setattr(ranks, "_on_ranks", states)
    finding = ranks.ranks(Trial(wrong.LocalStatistic))
    assert finding.passed is False and re.search("rank 0 of 2 differs .*centre: a statistic of a", finding.sentence)
    assert ranks.ranks(Trial(wrong.Right)).passed


def test_mistakes_of_the_caller() -> None:
    for call, message in (
        (lambda: check_method("simclr"), "subclass of inbatch.methods.base.Method, not 'simclr'"),  # type: ignore[arg-type]
        (lambda: check_method(wrong.Right, batch_size=7), "even number"),
        (lambda: check_method(wrong.Right, batch_size=2), "at least 4"),
        (lambda: check_method(wrong.Right, temprature=1.0), "no option 'temprature'; there are temperature"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    report = check_method(wrong.Right, raise_errors=False, temperature=-1.0)
    assert [finding.kind for finding in report.failures] == ["heads"] and "-1" in report.failures[0].sentence
    assert inbatch.testing.check_method is check_method


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_our_methods_pass(name: str) -> None:
    wide = {"hidden_dim": 16} if name == "mmcr" else {}  # 8 leave rows of rank 7, where its norm has no derivative
    check_method(METHODS[name], processes=name in ("simclr", "moco"), **SMALL[name] | wide)


@pytest.mark.slow
@pytest.mark.parametrize("method", WRONG, ids=lambda method: method.__name__)
def test_wrong_methods_fail_the_whole_check(method: type[Method]) -> None:
    report = check_method(method, processes=False, raise_errors=False)
    assert any(re.search(WRONG[method][1], finding.sentence) for finding in report.failures)


@pytest.mark.slow
def test_ranks_in_processes_of_their_own() -> None:
    """Of a method in a module, and of one that only this process knows."""

    class Local(wrong.Right):
        pass

    for method, passed in ((wrong.Right, True), (Local, True), (wrong.LocalStatistic, False), (wrong.ReadsRank, False)):
        finding = ranks.ranks(Trial(method))
        assert finding.passed is passed, finding
