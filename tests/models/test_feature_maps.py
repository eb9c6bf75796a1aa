"""Feature maps and patch tokens: shapes, strides, and that the last map is what the encoder pools."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import SwinTransformer

import inbatch
from inbatch.errors import ConfigError, DataError
from inbatch.evaluation import Embeddings, Tokens, write_embeddings
from inbatch.models import Encoder, create_encoder, save_encoder
from inbatch.models.feature_maps import stages

MEAN_POOLED = {
    "fast": (64, [(8, 32), (16, 16), (32, 8), (64, 4)]),
    "resnet10": (32, [(64, 32), (128, 16), (256, 8), (512, 4)]),  # the CIFAR stem
}


def pictures(count: int, encoder: Encoder) -> torch.Tensor:
    return torch.randint(0, 256, (count, encoder.channels, encoder.size, encoder.size), dtype=torch.uint8)


def test_the_last_map_is_what_is_pooled() -> None:
    for name, (size, expected) in MEAN_POOLED.items():
        options = {"width": 8} if name == "fast" else {}
        encoder = create_encoder(name, size=size, check=False, **options).eval()
        images = pictures(2, encoder)
        maps = encoder.features(images)
        assert [(m.shape[1], m.shape[2]) for m in maps] == expected, name
        np.testing.assert_allclose(maps[-1].mean((2, 3)).numpy(), encoder.embed(images), rtol=1e-5, atol=1e-6)
        assert torch.equal(encoder.tokens(images), maps[-1].flatten(2).mT)
        assert not maps[-1].requires_grad and not any(m._forward_hooks for m in encoder.modules())


def test_maps_of_torchvisions_swin_have_their_channels_first() -> None:
    swin = SwinTransformer([4, 4], embed_dim=12, depths=[1, 1], num_heads=[1, 1], window_size=[2, 2])
    swin.head = nn.Identity()
    assert [tuple(m.shape) for m in stages(swin, torch.randn(2, 3, 32, 32))] == [(2, 12, 8, 8), (2, 24, 4, 4)]


def test_tokens_of_a_vit_are_its_normed_patches() -> None:
    encoder = create_encoder("vit_tiny_patch16_224", size=32, depth=5, check=False).eval()
    images = pictures(2, encoder)
    with torch.no_grad():
        expected = encoder.backbone.forward_features(encoder.preprocess(images))[:, 1:]
    assert torch.equal(encoder.tokens(images), expected)
    maps = encoder.features(images)
    assert [m.shape for m in maps] == [(2, 192, 2, 2)] * 4
    assert not torch.equal(maps[0], maps[1])


@pytest.mark.slow
def test_maps_of_other_families() -> None:
    expected = {
        ("torchvision/resnet18", 72): [(64, 36), (64, 18), (128, 9), (256, 5), (512, 3)],
        ("torchvision/vit_b_16", 32): [(768, 2)],
        ("torchvision/swin_t", 64): [(96, 16), (192, 8), (384, 4), (768, 2)],
        ("torchvision/densenet121", 64): [(64, 32), (256, 16), (512, 8), (1024, 4), (1024, 2)],
        ("swin_tiny_patch4_window7_224", 224): [(96, 56), (192, 28), (384, 14), (768, 7)],
        ("convnext_atto", 64): [(40, 16), (80, 8), (160, 4), (320, 2)],
        ("resnetv2_50", 96): [(64, 48), (256, 24), (512, 12), (1024, 6), (2048, 3)],
    }
    for (name, size), shapes in expected.items():
        encoder = create_encoder(name, size=size, check=False).eval()
        assert [(m.shape[1], m.shape[2]) for m in encoder.features(pictures(1, encoder))] == shapes, name


def test_feature_maps_have_a_gradient_if_enabled() -> None:
    encoder = create_encoder("tiny", size=20, channels=1)
    stages(encoder.backbone, torch.rand(2, 1, 20, 20))[-1].sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_a_backbone_without_maps() -> None:
    encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), name="own", size=4)
    with pytest.raises(ConfigError, match="Sequential gives no feature maps: choose a ResNet"):
        encoder.features(pictures(1, encoder))


def test_files_of_tokens(tmp_path: Path) -> None:
    encoder = create_encoder("tiny", size=20, channels=1).eval()
    save_encoder(encoder, tmp_path / "encoder")
    images = pictures(3, encoder)
    expected = encoder.tokens(images).numpy()
    for name, half in (("a.npz", False), ("b.npz", True), ("c.parquet", False), ("d.parquet", True)):
        file = tmp_path / name
        assert inbatch.embed_run(tmp_path / "encoder", images, file, tokens=True, float16=half) == 3
        if name.endswith("npz"):
            with np.load(file) as read:
                assert "vector" not in read and read["grid"].tolist() == [10, 10]
                tokens = read["tokens"]
        else:
            table = pytest.importorskip("pyarrow.parquet").read_table(file)
            assert table.schema.metadata[b"inbatch.tokens"] == b'{"grid": [10, 10], "width": 96}'
            tokens = np.stack(table["tokens"].to_numpy()).reshape(3, 100, 96)
        assert tokens.shape == (3, 100, 96) and tokens.dtype == (np.float16 if half else np.float32)
        np.testing.assert_allclose(tokens, expected, rtol=1e-3 if half else 0, atol=1e-3 if half else 0)
    with pytest.raises(ConfigError, match="--float16 halves the files of --tokens"):
        inbatch.embed_run(tmp_path / "encoder", images, tmp_path / "e.npz", float16=True)
    large = Embeddings(torch.full((1, 2), 1e6), torch.tensor([-1]), ("0",), "images", "tokens")
    with pytest.raises(DataError, match=r"tokens reach 1e\+06, which float16 does not hold"):
        write_embeddings(tmp_path / "f.npz", [large], Tokens((1, 1), 2, half=True))
    assert not (tmp_path / "f.npz").exists()
