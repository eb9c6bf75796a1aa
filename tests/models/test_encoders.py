"""Encoders: their architecture, their preprocessing, and that a saved encoder loads unchanged."""

import json
import math
import warnings

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from inbatch.errors import ConfigError, DataError
from inbatch.models import Encoder, create_encoder, load_encoder, save_encoder


def parameters(encoder):
    return sum(p.numel() for p in encoder.parameters())


def images(n, channels=3, height=32, width=32):
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, channels, height, width), generator=draw, dtype=torch.uint8)


def used(encoder, seed=0):
    """Move batch-norm statistics and weights off their initial values."""
    torch.manual_seed(seed)
    encoder.train()
    for norm in (m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
    encoder(torch.randn(8, encoder.channels, encoder.size, encoder.size))
    return encoder.eval()


@pytest.mark.grid(3)
@pytest.mark.parametrize(
    ("name", "size", "channels", "stem", "width", "count"),
    [
        ("resnet18", 32, 3, "cifar", 512, 11_168_832),
        ("resnet18", 64, 1, "cifar", 512, 11_168_832 - 2 * 9 * 64),
        ("resnet18", 65, 3, "imagenet", 512, 11_176_512),
        ("torchvision/resnet18", 32, 3, "cifar", 512, 11_168_832),
        ("resnet10", 32, 3, "cifar", 512, 4_898_112),
        ("tiny", 20, 1, None, 96, 74_400),
    ],
)
def test_sizes(name, size, channels, stem, width, count):
    encoder = create_encoder(name, size=size, channels=channels)
    assert (encoder.stem, encoder.width, parameters(encoder)) == (stem, width, count)
    assert encoder(torch.randn(2, channels, size, size)).shape == (2, width)


def test_cifar_stem_keeps_the_resolution():
    """A 32-pixel image reaches the last stage with 4x4 positions (3 halvings), not with one."""
    shapes = []
    for stem in ("cifar", "imagenet"):
        encoder = create_encoder("resnet18", size=32, stem=stem)
        encoder.backbone.layer4.register_forward_hook(lambda m, i, out: shapes.append(tuple(out.shape[2:])))
        shapes.clear()
        encoder(torch.randn(2, 3, 32, 32))
        assert shapes == [{"cifar": (4, 4), "imagenet": (1, 1)}[stem]]


def test_torchvision_and_timm_resnets_are_the_same():
    ours = create_encoder("resnet18", size=32).eval()
    theirs = create_encoder("torchvision/resnet18", size=32)
    theirs.backbone.load_state_dict(ours.backbone.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(ours(x), theirs.eval()(x), atol=1e-5)


def test_models_of_fixed_size_get_the_image_size():
    encoder = create_encoder("vit_tiny_patch16_224", size=32, patch_size=4, depth=1)
    assert encoder.stem is None
    assert encoder.backbone.patch_embed.num_patches == 64


@pytest.mark.parametrize(("name", "channels"), [("torchvision/mobilenet_v3_small", 5), ("resnet10", 2)])
def test_channels(name, channels):
    encoder = create_encoder(name, size=32, channels=channels)
    assert encoder.mean == (0.5,) * channels and encoder.std == (0.25,) * channels
    assert encoder(torch.randn(2, channels, 32, 32)).shape == (2, encoder.width)


@pytest.mark.grid(6)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "resnet19", "size": 32}, "resnet18"),
        ({"name": "torchvision/resnet19", "size": 32}, "torchvision/resnet18"),
        ({"name": "resnet18", "size": 32, "depth": 3}, "depth"),
        ({"name": "resnet18", "size": 32, "drop_rate": print}, "JSON"),
        ({"name": "resnet18", "size": 32, "stem": "small"}, "imagenet"),
        ({"name": "tiny", "size": 32, "stem": "cifar"}, "not a ResNet"),
        ({"name": None, "size": 32}, "must be a text"),
        ({"name": "tiny", "size": 32.0}, "whole number"),
        ({"name": "tiny", "size": "32"}, "whole number"),
        ({"name": "tiny", "size": 32, "channels": 0}, "at least 1"),
        ({"name": "tiny", "size": 32, "channels": 1.5}, "whole number"),
        ({"name": "resnet18", "size": 32, "mean": [0.5]}, "3 numbers"),
        ({"name": "tiny", "size": 32, "mean": 0.5}, "3 numbers"),
        ({"name": "tiny", "size": 32, "mean": "abc"}, "3 numbers"),
        ({"name": "tiny", "size": 32, "std": [math.nan] * 3}, "3 numbers"),
        ({"name": "tiny", "size": 32, "std": [0, 1, 1]}, "above 0"),
        ({"name": "tiny", "size": 32, "init": "timm"}, "timm"),
        ({"name": "torchvision/squeezenet1_0", "size": 64}, "classifier"),
        ({"name": "swin_tiny_patch4_window7_224", "size": 3}, "cannot"),
    ],
)
def test_wrong_settings(arguments, words):
    with pytest.raises(ConfigError, match=words):
        create_encoder(**arguments)


def test_a_backbone_must_pool():
    with pytest.raises(ConfigError, match="one row"):
        Encoder(nn.Conv2d(3, 8, 3), name="conv", size=8)


def test_weights_without_a_network(monkeypatch):
    def fail(*args, pretrained, **kwargs):
        if pretrained:
            raise OSError("no route to host")
        return create(*args, **kwargs)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", fail)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # so that the HTTP client is used
    with pytest.raises(ConfigError, match=r"no route to host.*safetensors"):
        create_encoder("resnet18", size=224, init="timm")


def test_weights_in_the_hubs_cache_need_no_network(tmp_path, monkeypatch):
    name = "mobilenetv3_small_050"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"not in a cache, and https://.* does not answer.*safetensors"):
        create_encoder(name, size=224, init="timm")
    repository = tmp_path / f"models--{timm.get_pretrained_cfg(name).hf_hub_id.replace('/', '--')}"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    published = timm.create_model(name)
    safetensors.torch.save_file(published.state_dict(), repository / "snapshots" / "abc" / "model.safetensors")
    encoder = create_encoder(name, size=224, init="timm")
    assert torch.equal(encoder.backbone.conv_stem.weight, published.conv_stem.weight)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (224, 300), (256, 256), (100, 90)])
@pytest.mark.parametrize("size", [224, 32])
def test_prepare_is_torchvisions_resize_and_centre_crop(size, height, width):
    encoder = create_encoder("tiny", size=size, channels=3)
    image = images(1, 3, height, width)
    reference = v2.Compose(
        [
            v2.ToDtype(torch.float32),
            v2.Resize(256 if size == 224 else 32, antialias=True),
            v2.CenterCrop(size),
            v2.Normalize([255 * m for m in encoder.mean], [255 * s for s in encoder.std]),
        ]
    )
    assert torch.allclose(encoder.prepare(image), reference(image), atol=1e-5)


def test_prepare_takes_lists_and_leaves_the_right_size_alone():
    encoder = create_encoder("tiny", size=160, channels=1)
    same = images(2, 1, 160, 160)
    assert torch.equal(encoder.prepare(same), (same / 255 - 0.5) / 0.25)
    mixed = [same[0], images(1, 1, 300, 200)[0], same[1]]
    prepared = encoder.prepare(mixed)
    assert torch.equal(prepared[[0, 2]], encoder.prepare(same))
    assert torch.equal(prepared[1:2], encoder.prepare(mixed[1][None]))


@pytest.mark.parametrize("wrong", [torch.zeros(1, 1, 20, 20), images(1, 3, 20, 20), torch.zeros(20, 20)])
def test_prepare_refuses(wrong):
    with pytest.raises(DataError, match="uint8 images of 1 channels"):
        create_encoder("tiny", size=20, channels=1).prepare(wrong)


def test_embed_accepts_arrays_tensors_and_lists():
    encoder = used(create_encoder("tiny", size=20, channels=3))
    batch = images(5, 3, 20, 20)
    expected = encoder(encoder.prepare(batch)).detach().numpy()
    last = batch.permute(0, 2, 3, 1).contiguous().numpy()
    pictures = [Image.fromarray(i) for i in last]
    for data in (batch, batch.numpy(), last, pictures, list(batch), list(last)):
        features = encoder.embed(data, batch=2)
        assert features.dtype == np.float32
        assert np.allclose(features, expected, atol=1e-5)
    assert encoder.embed([]).shape == (0, 96)
    for alone in (pictures[1], last[1], batch[1]):
        assert np.allclose(encoder.embed(alone), expected[1:2], atol=1e-5)


def test_embed_takes_views_of_arrays_and_read_only_ones():
    encoder = used(create_encoder("tiny", size=20, channels=3))
    array = images(3, 3, 20, 20).numpy()
    read_only = array.copy()
    read_only.setflags(write=False)
    for data in (array[:, ::-1], array[..., ::-1], array[::-1], read_only):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            features = encoder.embed(data)
        assert np.array_equal(features, encoder.embed(data.copy()))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (None, "a list of images, not NoneType"),
        ((image for image in images(2, 3, 20, 20)), "a list of images, not generator"),
        ({"image": images(1, 3, 20, 20)}, "a list of images, not dict"),
        ("photos", r"not str; inbatch.embed_run\(RUN, DATA, OUT\)"),
        (np.uint8(5), "a list of images, not numpy.uint8"),
        (["a.jpg"], "'a.jpg' is a path; open it"),
        ((np.zeros((2, 20, 20, 3), np.uint8), np.zeros(2, np.uint8)), r"the shape \(2, 20, 20, 3\)"),
        ((images(2, 3, 20, 20), torch.zeros(2, dtype=torch.uint8)), r"the shape \(2, 3, 20, 20\), not \(C, h, w\)"),
    ],
)
def test_embed_refuses_what_holds_no_images(wrong, words):
    encoder = create_encoder("tiny", size=20, channels=3)
    for use in (encoder.embed, encoder.preprocess):
        with pytest.raises(DataError, match=words):
            use(wrong)


def test_no_image_and_values_of_unknown_range_are_refused():
    encoder = create_encoder("tiny", size=20)
    with pytest.raises(DataError, match="there is no image"):
        encoder.preprocess([])
    with pytest.raises(DataError, match="takes uint8 images"):
        encoder.embed([np.zeros((0, 20, 3), np.uint8)])
    with pytest.raises(DataError, match=r"encoder\.levels = \(0, 1\)"):
        encoder.embed(np.zeros((2, 20, 20, 3)))


def test_mean_and_std_may_be_arrays():
    encoder = create_encoder("tiny", size=20, mean=np.array([0.1, 0.2, 0.3]), std=torch.tensor([0.5, 0.5, 0.5]))
    assert encoder.mean == (0.1, 0.2, 0.3) and encoder.std == (0.5,) * 3


def test_preprocess_is_what_embed_computes_with():
    encoder = used(create_encoder("tiny", size=20, channels=3))
    batch = images(4, 3, 24, 30)
    pictures = [Image.fromarray(i) for i in batch.permute(0, 2, 3, 1).contiguous().numpy()]
    for data in (batch, batch.numpy(), pictures):
        prepared = encoder.preprocess(data)
        assert prepared.shape == (4, 3, 20, 20) and torch.equal(prepared, encoder.prepare(batch))
        with torch.no_grad():
            assert np.allclose(encoder(prepared).numpy(), encoder.embed(data), atol=1e-5)


def test_unnormalised_images_give_one_warning():
    batch = images(2, 3, 20, 20)
    for raw in (batch / 255, batch.float()):
        encoder = create_encoder("tiny", size=20, channels=3).eval()
        with pytest.warns(
            UserWarning, match=r"from 0\.00 to (1|255)\.00: the features will be wrong.*preprocess"
        ) as caught:
            encoder(raw)
            encoder(raw)
        assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.raises(DataError, match=r"not torch.uint8: pass encoder\.preprocess"):
        encoder(batch)
    encoder, white = create_encoder("tiny", size=20, channels=3).eval(), torch.full((2, 3, 20, 20), 255).byte()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for clean in (batch, white, 0 * white, batch // 2 + 128):
            encoder(encoder.preprocess(clean))
        encoder.train()(batch / 255)  # views have any values


def test_embed_grey_arrays_and_turned_photos():
    encoder = used(create_encoder("tiny", size=20, channels=1))
    grey = images(2, 1, 20, 20)
    assert np.allclose(encoder.embed(grey[:, 0].numpy()), encoder.embed(grey), atol=1e-6)
    for alone in (grey[0, 0].numpy(), grey[0, 0, :, :, None].numpy(), grey[0]):
        assert np.allclose(encoder.embed(alone), encoder.embed(grey[:1]), atol=1e-6)
    turned = Image.fromarray(grey[0, 0].numpy())
    turned.getexif()[0x0112] = 6  # to be displayed rotated by 90 degrees clockwise
    assert np.allclose(encoder.embed([turned]), encoder.embed(torch.rot90(grey[:1], -1, (2, 3))), atol=1e-5)


def test_evaluating_restores_every_mode():
    encoder = create_encoder("tiny", size=20, channels=1).train()
    frozen = encoder.backbone[1].eval()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    encoder.embed(images(3, 1, 20, 20))
    assert encoder.training and encoder.backbone[4].training and not frozen.training
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert torch.is_grad_enabled()


@pytest.mark.grid(2)
@pytest.mark.parametrize(
    ("name", "size", "channels", "kwargs"),
    [
        ("tiny", 20, 1, {}),
        ("resnet10", 32, 2, {}),
        ("torchvision/mobilenet_v3_small", 32, 3, {}),
        ("vit_tiny_patch16_224", 32, 3, {"patch_size": 8, "depth": 1}),
    ],
)
def test_saved_and_loaded(tmp_path, name, size, channels, kwargs):
    encoder = used(create_encoder(name, size=size, channels=channels, std=(0.3,) * channels, **kwargs))
    save_encoder(encoder, tmp_path / "encoder")
    again = load_encoder(tmp_path / "encoder")
    assert not again.training
    for key in ("name", "size", "channels", "mean", "std", "stem", "width", "arguments"):
        assert getattr(again, key) == getattr(encoder, key), key
    batch = images(3, channels, size, size)
    assert np.array_equal(again.embed(batch), encoder.embed(batch))
    assert sorted(p.name for p in (tmp_path / "encoder").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("name", "size", "channels", "kwargs"),
    [
        ("resnet10", 96, 3, {}),
        ("resnet10", 32, 1, {"stem": "imagenet"}),
        ("vit_tiny_patch16_224", 32, 2, {"patch_size": 8, "depth": 1}),
    ],
)
def test_timm_loads_what_we_save(tmp_path, name, size, channels, kwargs):
    encoder = used(create_encoder(name, size=size, channels=channels, **kwargs))
    save_encoder(encoder, tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, channels, size, size)
    assert torch.equal(theirs(x), encoder(x))
    config = timm.data.resolve_model_data_config(theirs)
    assert (tuple(config["mean"]), tuple(config["std"])) == (encoder.mean, encoder.std)
    saved = json.loads((tmp_path / "config.json").read_text())
    # As transformers' AutoModel calls timm (TimmWrapperModel): with num_classes next to the other arguments.
    timm.create_model(saved["architecture"], pretrained=False, num_classes=0, **saved["model_args"])
    assert saved["num_classes"] == 0


def test_damaged_weights_are_refused(tmp_path):
    save_encoder(create_encoder("tiny", size=20, channels=1), tmp_path)
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        load_encoder(tmp_path)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="damaged"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        load_encoder(tmp_path)


def test_an_encoder_of_ones_own_saves_but_does_not_load_by_name(tmp_path):
    own = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), name="own", size=2)
    save_encoder(own, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["inbatch"]["width"] == 4
    with pytest.raises(DataError, match="build it yourself"):
        load_encoder(tmp_path)


def test_init_from_a_folder_and_from_state_dicts(tmp_path):
    source = used(create_encoder("resnet10", size=32, mean=(0.4, 0.5, 0.6)), seed=3)
    save_encoder(source, tmp_path)
    torch.save(source.backbone.state_dict(), tmp_path / "backbone.pt")
    torch.save(source.state_dict(), tmp_path / "encoder.pth")
    batch = images(2)
    for init in (tmp_path, tmp_path / "model.safetensors", tmp_path / "backbone.pt", tmp_path / "encoder.pth"):
        again = create_encoder("resnet10", size=32, init=init, mean=None if init is tmp_path else source.mean)
        assert again.mean == (0.4, 0.5, 0.6)
        assert np.array_equal(again.embed(batch), source.embed(batch)), init


@pytest.mark.slow
def test_init_takes_off_a_classifier(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "classifier.pt")
    for name in ("resnet18", "torchvision/resnet18"):
        create_encoder(name, size=224, init=tmp_path / "classifier.pt")


def test_init_of_the_encoder_fast_with_another_stem_names_the_image_size(tmp_path):
    save_encoder(create_encoder("fast", size=32, width=8), tmp_path / "small")
    with pytest.raises(ConfigError, match=r"3x3 in the weights, but 7x7.*choose at most 96 pixels .--image-size 32"):
        create_encoder("fast", size=128, width=8, init=tmp_path / "small")


@pytest.mark.slow
def test_init_that_does_not_fit(tmp_path):
    save_encoder(create_encoder("resnet10", size=32), tmp_path / "cifar")
    with pytest.raises(ConfigError, match=r"3x3 in the weights, but 7x7.*stem=\"cifar\""):
        create_encoder("resnet10", size=224, stem="imagenet", init=tmp_path / "cifar")
    with pytest.raises(ConfigError, match=r"missing \(layer1\.1"):
        create_encoder("resnet18", size=32, init=tmp_path / "cifar")
    with pytest.raises(ConfigError, match=r"unexpected|further blocks"):
        save_encoder(create_encoder("resnet18", size=32), tmp_path / "deeper")
        create_encoder("resnet10", size=32, init=tmp_path / "deeper")
    with pytest.raises(DataError, match="cannot be read"):
        create_encoder("resnet10", size=32, init=tmp_path / "absent.pt")
    with pytest.raises(ConfigError, match=r"\.safetensors"):
        create_encoder("resnet10", size=32, init=tmp_path / "weights.onnx")


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


def test_init_runs_no_pickle(tmp_path, capsys):
    torch.save({"conv1.weight": Bomb()}, tmp_path / "evil.pt")
    with pytest.raises(DataError, match="cannot be read"):
        create_encoder("resnet10", size=32, init=tmp_path / "evil.pt")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("ours", [{}, None, {"name": "tiny"}])
def test_a_config_that_does_not_describe_its_weights_is_named(tmp_path, ours):
    save_encoder(create_encoder("tiny", size=12), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"inbatch": ours}))
    for read in (load_encoder, lambda folder: create_encoder("resnet18", size=32, init=folder)):
        with pytest.raises(DataError, match=r"config\.json does not describe the weights .* 'inbatch' lacks 'sha256'"):
            read(tmp_path)
