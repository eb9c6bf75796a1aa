"""Sizes that an encoder takes: other sizes of views, patches, auxiliary outputs, and the sentence for each failure."""

import re
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from inbatch.errors import ConfigError, reason
from inbatch.models import Encoder, check_side, create_encoder, load_encoder, save_encoder
from inbatch.models.backbones import torchvision_defaults
from inbatch.training.build import build
from inbatch.training.recipe import make
from inbatch.training.run_encoder import make_encoder, view_sides

VIT = {"encoder.name": "vit_tiny_patch16_224", "encoder.patch_size": 8, "encoder.depth": 1, "encoder.embed_dim": 24}
SWIN = {
    "encoder.name": "swin_tiny_patch4_window7_224", "encoder.depths": [1, 1], "encoder.embed_dim": 24,
    "encoder.num_heads": [3, 6],
}  # fmt: skip
SMALL = {"data": "digits-canvas-colour", "image_size": 32, "batch_size": 8, "channels": 3}
CROPS = {"method.name": "swav", "views.name": "swav_cifar", "method.num_prototypes": 4}


class Images:
    """A source of which only the number and the labels are needed."""

    def __init__(self):
        self.labels, self.name, self.channels = torch.arange(8) % 2, "images", 3

    def __len__(self):
        return 8


def test_vit_and_swin_take_views_of_another_size_with_the_same_weights():
    for encoder in (VIT, SWIN):
        recipe = make(SMALL | CROPS | encoder)
        assert view_sides(recipe) == {32: "image_size", 16: "views.small_size"}
        torch.manual_seed(3)
        several = make_encoder(recipe, None).eval()
        torch.manual_seed(3)
        one = make_encoder(make(SMALL | {"method.name": "simclr"} | encoder), None).eval()
        assert several.arguments["dynamic_img_size"] and "dynamic_img_size" not in one.arguments
        x = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(several(x), one(x))
            assert several(torch.randn(2, 3, 16, 16)).shape == (2, several.width)
        with pytest.raises(ConfigError, match=r"Set views\.small_size to 32"):
            check_side(one, 16, "views.small_size")


def test_views_of_another_size_or_of_no_multiple_are_refused_before_the_first_step():
    fixed = {"encoder.name": "test_vit_relpos"}
    for settings, words in (
        (CROPS | fixed, r"test_vit_relpos \(timm .*train on images of 3x16x16.*small_size to 32.*ResNet"),
        (CROPS | VIT | {"views.small_size": 20}, "20 pixels .* last 4, 36%.*views.small_size to 16 or 24"),
        (VIT | {"grow_from": 0.625, "grow_until": 0.5}, "20 pixels .* grow_from x views.size to 16 or 24"),
        (VIT | {"image_size": 30}, "30 pixels .* last 6, 36%.*image_size to 24 or 32"),
    ):
        with pytest.raises(ConfigError, match=words):
            build(make(SMALL | settings), Images(), device=torch.device("cpu"))


def test_side_that_is_not_a_multiple_of_the_patch_is_refused_except_in_saved_encoders(tmp_path):
    for name, size, options, other in (
        ("vit_tiny_patch16_224", 32, {"patch_size": 14, "depth": 1}, "28 or 42"),
        ("test_convnext", 34, {}, "32 or 36"),
    ):
        with pytest.raises(ConfigError, match=f"of {size} pixels a side it would ignore .*Set size to {other}"):
            create_encoder(name, size=size, **options)
    old = create_encoder("vit_tiny_patch16_224", size=32, patch_size=14, depth=1, check=False)
    save_encoder(old, tmp_path)
    assert load_encoder(tmp_path).size == 32


def test_a_model_that_pads_its_patches_takes_any_side():
    options = {"patch_size": 8, "depth": 1, "dynamic_img_size": True}
    encoder = create_encoder("vit_tiny_patch16_224", size=32, dynamic_img_pad=True, **options)
    check_side(encoder, 20)
    with pytest.raises(ConfigError, match="last 4, 36%"):
        check_side(create_encoder("vit_tiny_patch16_224", size=32, **options), 20)


def test_auxiliary_heads_are_off():
    encoder = create_encoder("torchvision/googlenet", size=32)
    assert encoder.train()(torch.zeros(2, 3, 32, 32)).shape == (2, encoder.width)
    with pytest.raises(ConfigError, match=r"GoogLeNetOutputs in training.*auxiliary outputs"):
        create_encoder("torchvision/googlenet", size=32, aux_logits=True)


@pytest.mark.slow
def test_inception_trains_without_its_auxiliary_head():
    encoder = create_encoder("torchvision/inception_v3", size=75)
    assert encoder.train()(torch.zeros(2, 3, 75, 75)).shape == (2, 2048)


def test_weights_of_auxiliary_heads_are_left_out(tmp_path):
    import torchvision

    torch.save(torchvision.models.googlenet(init_weights=False).state_dict(), tmp_path / "published.pt")
    create_encoder("torchvision/googlenet", size=32, init=tmp_path / "published.pt")


def test_torchvision_models_of_fixed_size_get_the_size():
    assert torchvision_defaults("vit_b_32", 32) == {"image_size": 32}
    assert torchvision_defaults("maxvit_t", 32) == {"input_size": (32, 32)}
    assert torchvision_defaults("resnet18", 32) == {}


def test_the_check_changes_neither_buffers_nor_the_random_state():
    torch.manual_seed(0)
    plain = create_encoder("test_efficientnet", size=32, drop_path_rate=0.2, check=False)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    checked = create_encoder("test_efficientnet", size=32, drop_path_rate=0.2)
    assert torch.equal(state, torch.get_rng_state()) and checked.training
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in checked.state_dict().items())


def test_every_exception_of_a_library_is_a_sentence_with_library_model_and_size(monkeypatch):
    def fail(*args, **kwargs):
        raise error

    real = timm.create_model
    for error in (KeyError("stem"), AttributeError("no blocks"), ZeroDivisionError(), ImportError("no module flash")):
        monkeypatch.setattr(timm, "create_model", fail)
        words = rf"resnet18 \(timm {re.escape(version('timm'))}\) cannot be built for 48x48 pixels and 3 channels"
        with pytest.raises(ConfigError, match=rf"{words} with depth = 2: {type(error).__name__}.*published for 224"):
            create_encoder("resnet18", size=48, depth=2)
    monkeypatch.setattr(timm, "create_model", real)
    with pytest.raises(ConfigError, match=r"halonet26t .*take images of 3x64x64: AssertionError in halo_attn.*block"):
        create_encoder("halonet26t", size=64)
    with pytest.raises(ConfigError, match=r"torchvision/maxvit_t \(torchvision .*64x64 pixels.*partition"):
        create_encoder("torchvision/maxvit_t", size=64)


def test_a_users_backbone_is_not_blamed_on_a_library():
    class Broken(nn.Module):
        def forward(self, x):
            raise IndexError

    with pytest.raises(ConfigError, match=r"^own cannot take images of 3x8x8: IndexError in test_input_sizes.py, line"):
        Encoder(Broken(), name="own", size=8)


def test_a_reason_is_never_empty():
    assert reason(ValueError("two\n lines.")) == "ValueError: two lines"
    assert reason(ValueError()) == "ValueError"
    try:
        SimpleNamespace().missing  # noqa: B018
    except AttributeError as error:
        assert "missing" in reason(error)
    try:
        assert not reason
    except AssertionError as error:
        assert "assert not reason" in reason(error)
