"""Few labels: the choice of the labels that are kept, and the training on them."""

import json

import pytest
import torch
from bars_data import bars_run, command
from feature_sets import clouds

from inbatch.apps.cli.output import conditions, figures, print_figures
from inbatch.errors import ConfigError, DataError
from inbatch.evaluation import evaluate, evaluate_few_labels, few_labels, knn, linear_probe


def slow_few_labels(labels, share, seed):
    """Select by class: the first of its images in the seed's order."""
    from inbatch.rng import permutation

    order = permutation(seed, 0, len(labels)).tolist()
    kept = []
    for c in sorted({int(x) for x in labels if x >= 0}):
        of_class = [i for i in order if labels[i] == c]
        kept += of_class[: max(1, round(share * len(of_class)))]
    return sorted(kept)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.33, 0.5, 1.0])
def test_kept_labels_are_those_of_the_slow_version(share):
    labels = torch.randint(-1, 5, (400,)) * 2  # classes 0, 2, 4, ...; -2 is unknown
    labels[7] = 9  # a class of one image
    for seed in (0, 3):
        assert few_labels(labels, share, seed).tolist() == slow_few_labels(labels, share, seed)


def test_shares_are_balanced_and_nested_and_differ_by_seed():
    labels = torch.arange(1000) % 10
    kept = {share: few_labels(labels, share, 1) for share in (0.01, 0.1, 0.5)}
    for share, places in kept.items():
        assert labels[places].bincount().tolist() == [round(100 * share)] * 10
    assert set(kept[0.01].tolist()) < set(kept[0.1].tolist()) < set(kept[0.5].tolist())
    assert kept[0.1].tolist() != few_labels(labels, 0.1, 2).tolist()
    assert few_labels(labels, 1.0).tolist() == list(range(1000))


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_shares_that_are_none(share):
    with pytest.raises(ConfigError, match="share"):
        few_labels(torch.tensor([0, 1]), share)


def test_figures_are_those_of_the_protocols_on_the_kept_images():
    train, test = clouds(300, spread=2), clouds(200, spread=2, seed=1)
    result = evaluate_few_labels(train, test, shares=(0.02, 0.2), draws=2, k=20, seed=5)
    assert list(result["shares"]) == ["2%", "20%"] and result["seeds"] == [5, 6]
    for share, one in zip((0.02, 0.2), result["shares"].values(), strict=True):
        each = [train.take(few_labels(train.labels, share, seed)) for seed in (5, 6)]
        k = min(20, len(each[0]))
        assert (one["images"], one["knn"]["k"]) == (len(each[0]), k)
        assert one["knn"]["each"]["top1"] == [knn(part, test, k)["top1"] for part in each]
        assert one["linear"]["each"]["top1"] == [linear_probe(part, test)["top1"] for part in each]
        for name in ("knn", "linear"):
            assert one[name]["top1"] == pytest.approx(sum(one[name]["each"]["top1"]) / 2)
    assert result["shares"]["2%"]["of_a_class"] == {"least": 2, "most": 2}
    assert result == evaluate_few_labels(train, test, shares=(0.02, 0.2), draws=2, k=20, seed=5)
    whole = evaluate_few_labels(train, test, shares=(1.0,), draws=1, k=20)["shares"]["100%"]
    assert (
        whole["linear"]["top1"] == linear_probe(train, test)["top1"]
        and whole["knn"]["top1"] == knn(train, test, 20)["top1"]
    )


def test_classes_of_different_sizes_are_stated():
    train = clouds(100)
    train.labels[:] = (torch.arange(100) >= 90).long()
    result = evaluate_few_labels(train, clouds(40), shares=(0.1,), draws=1)["shares"]["10%"]
    assert result["of_a_class"] == {"least": 1, "most": 9} and result["images"] == 10


def test_few_labels_need_a_draw_a_share_and_two_classes():
    with pytest.raises(ConfigError, match="not 3 and 0"):
        evaluate_few_labels(clouds(9), clouds(9), draws=0)
    with pytest.raises(ConfigError, match="not 0 and 3"):
        evaluate_few_labels(clouds(9), clouds(9), shares=())
    one = clouds(9)
    one.labels[:] = 0
    with pytest.raises(DataError, match="one class"):
        evaluate_few_labels(one, clouds(9))


def test_evaluate_and_the_table(capsys):
    train, test = clouds(300), clouds(100, seed=1)
    evaluation = evaluate(None, train, test, protocols=["knn", "few"], shares=[0.05], draws=1, k=9, seed=2)
    assert evaluation["few"] == evaluate_few_labels(train, test, shares=[0.05], draws=1, k=9, seed=2)
    assert json.loads(json.dumps(evaluation))
    ((row, entry),) = conditions(evaluation)
    assert row == "5% of the labels" and set(figures(entry)) == {"k-NN", "linear"}
    print_figures({"mine": evaluation})
    assert "  5% of the labels" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_line(tmp_path):
    folder = bars_run(tmp_path)
    result = command(f"evaluate {folder} --protocols knn,few --share 0.05 --share 0.5 --draws 2")
    assert result.exit_code == 0 and "5% of the labels" in result.stdout and "50% of the labels" in result.stdout
    written = json.loads((folder / "evaluation.json").read_text())
    assert set(written["few"]["shares"]) == {"5%", "50%"} and "linear" not in written
    assert command(f"evaluate {folder} --protocol few --share 2").exit_code == 2
    assert command(f"evaluate {folder} --protocol knn,fewer").exit_code == 2
