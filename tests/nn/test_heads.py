"""Projectors and predictors."""

import pytest
import torch
from torch import nn

from inbatch.nn.heads import Prototypes, hidden_widths, mlp


def kinds(network: nn.Sequential) -> list[str]:
    return [type(layer).__name__ for layer in network]


def test_prototypes_that_have_not_learned_stay_the_same_to_the_bit() -> None:
    for kind in (torch.float32, torch.float64):
        prototypes = Prototypes(128, 500).to(kind)
        prototypes.restore()
        before = prototypes.weight.clone()
        assert torch.equal(prototypes.restore(), before)
        with torch.no_grad():
            prototypes.weight[::2] *= 1.01
        after = prototypes.restore()
        assert torch.equal(after[1::2], before[1::2])
        assert torch.allclose(after.norm(dim=1), torch.ones(500, dtype=kind), rtol=16 * torch.finfo(kind).eps)


def test_mlp_has_norms_and_activations_between_linear_layers() -> None:
    assert kinds(mlp(8, 3)) == ["Linear"]
    assert kinds(mlp(8, 6, 3, norm=False)) == ["Linear", "ReLU", "Linear"]
    assert kinds(mlp(8, 6, 6, 3)) == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert kinds(mlp(8, 6, 3, last="norm")) == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert mlp(8, 6, 3)(torch.randn(5, 8)).shape == (5, 3)


def test_a_linear_layer_before_normalisation_has_no_bias() -> None:
    hidden, last = (mlp(8, 6, 3, last="norm_plain")[i] for i in (0, 3))
    assert hidden.bias is None and last.bias is None
    assert mlp(8, 6, 3, last="plain")[3].bias is None and len(mlp(8, 6, 3, last="plain")) == 4
    assert mlp(8, 6, 3)[3].bias is not None and mlp(8, 6, 3, norm=False)[0].bias is not None


def test_the_last_normalisation_learns_scale_and_shift_or_does_not() -> None:
    assert mlp(8, 6, 3, last="norm")[4].affine and not mlp(8, 6, 3, last="norm_plain")[4].affine


def test_mlp_of_one_width_is_refused() -> None:
    with pytest.raises(ValueError, match="input and an output"):
        mlp(8)
    for widths in ((8, 0), (8, -2, 3)):
        with pytest.raises(ValueError, match="at least 1"):
            mlp(*widths)


def test_hidden_widths_are_one_fewer_than_the_layers() -> None:
    assert hidden_widths(1, 64) == [] and hidden_widths(3, 64) == [64, 64] and hidden_widths(2, None, 12) == [12]
    with pytest.raises(ValueError, match="at least 1 linear layer, not 0"):
        hidden_widths(0, 64)
