"""Weights of other programs: layouts are recognised by content, adapted by timm's rules, and read without code."""

import argparse
import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from inbatch.errors import ConfigError, DataError
from inbatch.models import create_encoder, initial_weights
from inbatch.models.hub_weights import folder_weights
from inbatch.models.likely_encoder import likely_encoder
from inbatch.models.published_weights import MIN_MATCH, load, match
from inbatch.models.weight_files import Contents, read_contents

Tensors = dict[str, Tensor]


def resnet(**options: Any) -> nn.Module:
    return ResNet(options.pop("block", BasicBlock), options.pop("layers", (1, 1, 1, 1)), channels=(4, 4, 8, 8),
                  num_classes=0, **options)  # fmt: skip


def vit(**options: Any) -> nn.Module:
    return VisionTransformer(
        **{"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0} | options
    )


def state(module: nn.Module) -> Tensors:
    """Return random tensors for every entry, also for the statistics of batch norm."""
    return {k: torch.randn_like(v) if v.is_floating_point() else v + 7 for k, v in module.state_dict().items()}


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def sequence(tensors: Tensors, *left_out: str) -> Tensors:
    """Return the names of a ResNet whose modules are in an `nn.Sequential`, as its own `children()` give them."""
    places = [name for name, _ in resnet().named_children() if name not in left_out]
    return {f"{places.index(k.split('.')[0])}.{k.partition('.')[2]}": v for k, v in tensors.items()}


HEAD = {"0.weight": torch.ones(3, 8), "0.bias": torch.ones(3)}
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(4, 3, 7, 7)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def layouts(w: Tensors, k: Tensors) -> dict[str, tuple[Any, str]]:
    """Return files with the wanted weights w, and the other ones k of a second network; and the expected sentence."""
    seq, lightning = sequence(w), {"pytorch-lightning_version": "2.4.0", "optimizer_states": [OPTIMIZER], "epoch": 1}
    return {
        "plain": (w, "state dict): 65 of 65"),
        "moco": (
            {"arch": "resnet50", "state_dict": under("module.encoder_q.", w | under("fc.", HEAD))
             | under("module.encoder_k.", k) | {"module.queue": torch.ones(8, 5)}, "optimizer": OPTIMIZER},
            "MoCo v1 or v2, query encoder): 65 of 65 tensors fit. Not used: head: fc (2); "
            "another copy of the network: encoder_k (78); memory bank: queue (1); optimizer: optimizer (1)",
        ),
        "moco3": (
            {"state_dict": under("module.base_encoder.", w) | under("module.momentum_encoder.", k)
             | under("module.predictor.", HEAD)}, "MoCo v3, base encoder",
        ),
        "swav": (under("module.", w) | under("module.projection_head.", HEAD)
                 | {"module.prototypes.weight": torch.ones(3, 3)}, "(SwAV)"),
        "byol": (
            {"online_network_state_dict": under("encoder.", seq) | under("projetion.net.", HEAD),
             "target_network_state_dict": under("encoder.", sequence(k)), "optimizer_state_dict": OPTIMIZER},
            "BYOL, online network",
        ),
        "byol-learner": (under("net.", w) | under("online_encoder.net.", w) | under("target_encoder.net.", k),
                         "BYOL, online network"),
        "barlow": ({"model": under("module.backbone.", w) | under("module.projector.", HEAD)
                    | {"module.bn.running_mean": torch.ones(3)}}, "Barlow Twins"),
        "vicreg": ({"model": under("module.backbone.", w) | under("module.projector.", HEAD)}, "VICReg"),
        "dino": (
            {"student": under("module.backbone.", k) | under("module.head.mlp.", HEAD), "epoch": np.float64(3),
             "teacher": under("backbone.", w) | under("head.mlp.", HEAD), "optimizer": OPTIMIZER,
             "args": argparse.Namespace(path=Path("x"), lr=np.float32(1)), "dino_loss": {"center": torch.ones(1, 9)}},
            "DINO, teacher): 65 of 65",
        ),
        "simclr": ({"state_dict": under("backbone.", w | under("fc.", HEAD))}, "SimCLR (PyTorch), backbone"),
        "simclr-f": (under("f.", sequence(w, "maxpool")) | under("g.", HEAD), "SimCLR (PyTorch), encoder"),
        "simclr-encoder": (under("encoder.", w) | under("projector.", HEAD), "SimCLR (PyTorch), encoder"),
        "lightly": (lightning | {"state_dict": under("backbone.", seq) | under("projection_head.layers.", HEAD)},
                    "Lightning checkpoint, lightly, backbone"),
        "solo-learn": (
            lightning | {"state_dict": under("backbone.", w) | under("momentum_backbone.", k)
                         | under("projector.", HEAD) | {"classifier.weight": torch.ones(2, 8)}},
            "Lightning checkpoint, solo-learn, backbone",
        ),
        "lightning": (lightning | {"state_dict": under("model.", w)}, 'Lightning checkpoint, state dict within'),
        "vissl": ({"classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", w)}}}}, "VISSL"),
        "ema": ({"state_dict": k, "state_dict_ema": w, "args": argparse.Namespace()}, "average of weights, EMA"),
        "compiled": ({"net": under("module._orig_mod.", w)}, '"net.module._orig_mod."'),
    }  # fmt: skip


def loaded(path: Path, backbone: nn.Module, least: float = MIN_MATCH) -> str:
    channels = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d)).in_channels
    return load(backbone, match(backbone, read_contents(path), channels), "resnet", str(path), least)


def assert_holds(backbone: nn.Module, tensors: Tensors) -> None:
    assert all(torch.equal(value, tensors[name]) for name, value in backbone.state_dict().items())


def test_layouts_are_recognised_by_content_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    w, k = state(resnet()), state(resnet())
    path = tmp_path / "a name without meaning"
    for name, (content, sentence) in layouts(w, k).items():
        for old in (False, True) if name in ("moco", "dino") else (False,):
            torch.save(content, path, _use_new_zipfile_serialization=not old)
            backbone = resnet()
            notes = loaded(path, backbone)
            assert sentence in notes and "initialised" not in notes, (name, notes)
            assert_holds(backbone, w)
    safetensors.torch.save_file(under("encoder.", w), path)
    assert 'state dict within "encoder."' in loaded(path, resnet())


def test_the_converted_resnets_of_simclr_lightly_and_transformers(tmp_path: Path) -> None:
    """Names of other implementations; written with their own rules, not with those of the package."""
    backbone = resnet(block=Bottleneck)
    w = state(backbone)

    def simclr(name: str) -> str:
        name = re.sub(r"^conv1\.", "net.0.0.", re.sub(r"^bn1\.", "net.0.1.0.", name))
        name = re.sub(r"^layer(\d)\.(\d)\.", r"net.\1.blocks.\2.", name)
        name = name.replace("downsample.0.", "projection.shortcut.").replace("downsample.1.", "projection.bn.0.")
        name = re.sub(r"(blocks\.\d\.)conv(\d)", lambda m: f"{m[1]}net.{2 * int(m[2]) - 2}", name)
        return re.sub(r"(blocks\.\d\.)bn(\d)", lambda m: f"{m[1]}net.{2 * int(m[2]) - 1}.0", name)

    def transformers(name: str) -> str:
        name = re.sub(r"^conv1\.", "embedder.embedder.convolution.", name)
        name = re.sub(r"^bn1\.", "embedder.embedder.normalization.", name)
        name = re.sub(r"^layer(\d)\.(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.", name)
        name = name.replace("downsample.0", "shortcut.convolution").replace("downsample.1", "shortcut.normalization")
        name = re.sub(r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution.", name)
        return "resnet." + re.sub(r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization.", name)

    for rename, prefix, sentence in (
        (simclr, "resnet.", "converted from TensorFlow"), (transformers, "", "transformers"),
        (lambda name: name.replace("downsample", "shortcut"), "backbone.", 'within "backbone."'),
    ):  # fmt: skip
        torch.save({prefix + rename(name): value for name, value in w.items()}, tmp_path / "w.pt")
        backbone = resnet(block=Bottleneck)
        assert sentence in loaded(tmp_path / "w.pt", backbone)
        assert_holds(backbone, w)


def in_transformers(w: Tensors) -> Tensors:
    """Return the weights of a ViT by the names of transformers."""
    names = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    pairs = (("norm1", "layernorm_before"), ("norm2", "layernorm_after"), ("attn.proj", "attention.output.dense"),
             ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"), ("blocks", "encoder.layer"),
             ("patch_embed.proj", "embeddings.patch_embeddings.projection"))  # fmt: skip
    written: Tensors = {}
    for name, value in w.items():
        new = names.get(name, re.sub("^norm", "layernorm", name))
        for old, theirs in pairs:
            new = new.replace(old, theirs)
        parts = value.chunk(3) if "attn.qkv" in name else ()
        written |= {f"vit.{new.replace('attn.qkv', f'attention.attention.{which}')}": part
                    for which, part in zip(("query", "key", "value"), parts, strict=False)}  # fmt: skip
        written |= {} if parts else {f"vit.{new}": value}
    return written


def test_vision_transformers(tmp_path: Path) -> None:
    w = state(vit())
    chunks = {re.sub(r"blocks\.(\d)\.", r"blocks.0.\1.", name): value for name, value in w.items()}
    files: dict[str, Any] = {
        "DINO, teacher": {"teacher": under("backbone.", w), "student": under("module.backbone.", state(vit()))},
        "transformers": in_transformers(w) | {"classifier.weight": torch.ones(2, 2)},
        "MAE, encoder": {"model": w | {"mask_token": torch.ones(1, 1, 16), "decoder_blocks.0.norm1.bias": torch.ones(8)}
                         },
        "DINOv2, teacher": {"model": under("teacher.backbone.", chunks | {"mask_token": torch.ones(1, 16)})
                            | {"teacher.dino_head.mlp.0.weight": torch.ones(2, 2)}},
    }  # fmt: skip
    for sentence, content in files.items():
        torch.save(content, tmp_path / "w.pth")
        backbone = vit()
        notes = loaded(tmp_path / "w.pth", backbone)
        assert f"({tmp_path / 'w.pth'}" not in notes and sentence in notes and "30 of 30" in notes, notes
        assert "Adapted" not in notes
        assert_holds(backbone, w)


def test_errors_state_the_shapes_in_the_file(tmp_path: Path) -> None:
    torch.save(state(vit(embed_dim=8)), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"patch_embed.proj.weight \(8x3x8x8 in the file, 16x3x4x4 here\)"):
        loaded(tmp_path / "w.pth", vit(patch_size=4))


def test_dinov2_with_registers_and_layer_scale(tmp_path: Path) -> None:
    options = {"init_values": 1.0, "reg_tokens": 4, "no_embed_class": True}
    w = state(vit(**options))
    position, token = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    theirs = {k: v for k, v in w.items() if k not in ("reg_token", "cls_token", "pos_embed")}
    theirs |= {"register_tokens": w["reg_token"], "cls_token": token, "mask_token": torch.zeros(1, 16)}
    theirs["pos_embed"] = torch.cat([position, w["pos_embed"]], 1)
    pairs = (("blocks", "encoder.layer"), ("attn.proj", "attention.output.dense"),
             ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1"),
             ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
             ("pos_embed", "embeddings.position_embeddings"), ("cls_token", "embeddings.cls_token"),
             ("mask_token", "embeddings.mask_token"), ("register_tokens", "embeddings.register_tokens"))  # fmt: skip
    transformers: Tensors = {}
    for name, value in theirs.items():
        new = re.sub("^norm", "layernorm", name)
        for old, other in pairs:
            new = new.replace(old, other)
        parts = dict(zip(("query", "key", "value"), value.chunk(3), strict=True)) if "qkv" in name else {"": value}
        transformers |= {new.replace("attn.qkv", f"attention.attention.{part}"): v for part, v in parts.items()}
    for file, sentence in ((theirs, "DINOv2, backbone): 35 of 35"), (transformers, "35 of 35")):
        torch.save(file, tmp_path / "w.pth")
        backbone = vit(**options)
        assert sentence in loaded(tmp_path / "w.pth", backbone)
        assert_holds(backbone, w | {"cls_token": token + position})


def test_sizes_and_channels_are_adapted_by_timms_rules(tmp_path: Path) -> None:
    from timm.layers import resample_abs_pos_embed
    from timm.models import adapt_input_conv

    w = state(vit())
    torch.save(w, tmp_path / "w.pt")
    backbone = vit(img_size=64, in_chans=1)
    notes = loaded(tmp_path / "w.pt", backbone)
    assert "pos_embed 1x17x16 to 1x65x16" in notes and "patch_embed.proj.weight from 3 to 1 channel" in notes
    own = backbone.state_dict()
    assert torch.equal(own["pos_embed"], resample_abs_pos_embed(w["pos_embed"], [8, 8]))
    assert torch.equal(own["patch_embed.proj.weight"], adapt_input_conv(1, w["patch_embed.proj.weight"]))
    torch.save(state(resnet(in_chans=1)), tmp_path / "w.pt")
    notes = loaded(tmp_path / "w.pt", resnet())  # no rule exists: initialised and counted
    assert "64 of 65 tensors fit. Initialised or left out: 1 of another shape (conv1.weight (64x1x7x7 in" in notes


def test_near_misses_are_refused_and_can_be_accepted(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    w = state(resnet())
    missing = [name for name in w if name.startswith("layer4.0.bn")]
    torch.save({name: value for name, value in w.items() if name not in missing}, path)
    with pytest.raises(
        ConfigError, match=r"state dict\): 57 of 65 tensors fit; 8 missing \(layer4.0.bn1.weight.*--enc"
    ):
        loaded(path, resnet())
    for least in (-0.1, 2, math.nan, "most"):
        with pytest.raises(ConfigError, match="init_min_match must be a number from 0 to 1, not"):
            create_encoder("resnet10t", size=32, init=path, init_min_match=least)  # type: ignore[arg-type]
    backbone = resnet()
    assert "57 of 65 tensors fit. Initialised or left out: 8 missing" in loaded(path, backbone, least=0.8)
    own = backbone.state_dict()
    assert all(torch.equal(own[name], value) for name, value in w.items() if name not in missing)
    torch.save(state(resnet(layers=(1, 2, 1, 1))), path)
    with pytest.raises(ConfigError, match=r"65 of 65 tensors fit; 10 of further blocks \(layer2.1.conv1.weight"):
        loaded(path, resnet())
    torch.save(state(resnet(stem_width=2, stem_type="deep")), path)
    with pytest.raises(ConfigError, match="The stem differs"):
        loaded(path, resnet())
    w["layer1.0.conv1.weight"][0] = torch.inf
    torch.save(w, path)
    with pytest.raises(DataError, match=r"layer1.0.conv1.weight holds values that are not finite"):
        loaded(path, resnet())
    torch.save({k: (100 * v).to(torch.int8) for k, v in state(resnet()).items()}, path)
    with pytest.raises(DataError, match=r"conv1.weight, .* holds whole numbers \(int8\), as quantised weights do"):
        loaded(path, resnet())


# Files


class Harmful:
    """An object whose pickle calls a function that writes a file."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Settings:
    """An object of a class that no list knows."""


def test_no_code_of_a_file_is_run_and_its_objects_are_named(tmp_path: Path) -> None:
    marker, path = tmp_path / "executed", tmp_path / "w.pth.tar"
    for old in (False, True):
        # NumPy's names are among the stand-ins: the file is read, and nothing is called.
        weights: dict[str, Any] = {"net": {"a": torch.ones(2)}, "args": Harmful(np.save, str(marker), 1)}
        torch.save(weights, path, _use_new_zipfile_serialization=not old)
        assert list(read_contents(path).tensors) == ["net.a"]
        weights["args"] = Harmful(Path.touch, marker)
        torch.save(weights, path, _use_new_zipfile_serialization=not old)
        with pytest.raises(DataError, match=r"without running code of others: builtins\.getattr"):
            read_contents(path)
        assert not marker.exists() and not marker.with_suffix(".npy").exists()
        for content, kind in (
            (Settings(), "Settings"),
            (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
            (print, "print"),
        ):
            torch.save({"a": torch.ones(2), "args": content}, path, _use_new_zipfile_serialization=not old)
            with pytest.raises(DataError) as caught:
                read_contents(path)
            words = str(caught.value)
            assert kind in words and "torch.save(model.state_dict(), FILE)" in words
            assert "weights_only" not in words and "add_safe_globals" not in words


def test_checkpoints_with_settings_of_omegaconf_are_read(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    torch.save({"a": torch.ones(2), "cfg": omegaconf.OmegaConf.create({"x": {"y": [1, "z"]}})}, tmp_path / "w.ckpt")
    assert list(read_contents(tmp_path / "w.ckpt").tensors) == ["a"]


def test_files_that_are_not_weights_are_named(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100)}, tmp_path / "w")
    whole = (tmp_path / "w").read_bytes()
    with zipfile.ZipFile(tmp_path / "script", "w") as archive:
        archive.writestr("m/code/__torch__.py", "")
    np.savez(tmp_path / "arrays.npz", a=np.ones(3))
    files: dict[str, tuple[bytes, str]] = {
        "picture": (b"\x89PNG\r\n", "it is a picture"),
        "nothing": (b"", "it is empty"),
        "part": (whole[: len(whole) // 2], "incomplete or damaged archive"),
        "script.pt": ((tmp_path / "script").read_bytes(), "TorchScript archive"),
        "model.ckpt.index": (b"0" * 99 + bytes.fromhex("57fb808b247547db"), "TensorFlow"),
        "arrays": ((tmp_path / "arrays.npz").read_bytes(), r"NumPy arrays \(.npz\)"),
        "pointer.bin": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        "page.pth": (b"<!DOCTYPE html>", "web page"),
        "words": (b"some words", "neither a file of safetensors nor one of torch.save"),
    }
    for name, (content, sentence) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} cannot be read as weights: .*{sentence}"):
            create_encoder("tiny", size=32, init=tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"a folder needs model.safetensors"):
        create_encoder("tiny", size=32, init=tmp_path / "folder")


# Encoders


def test_the_files_of_an_index_are_read_together(tmp_path: Path) -> None:
    """The layout of transformers for large models: several files, and an index of them."""
    w = state(resnet())
    files = [f"model-0000{number + 1}-of-00002.safetensors" for number in range(2)]
    places = {name: files[number % 2] for number, name in enumerate(w)}
    for file in files:
        safetensors.torch.save_file({name: w[name] for name in w if places[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    for indent in (None, 2):
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}, indent=indent))
        backbone = resnet()
        assert "65 of 65 tensors fit" in loaded(index, backbone)
        assert_holds(backbone, w)
    foreign = folder_weights(tmp_path)
    assert foreign is not None and foreign[0].tensors.keys() == w.keys()
    for content, words in (
        ({"weight_map": places | {"x": files[0]}}, f"{files[0]} lacks x, which its index places there"),
        ({"weight_map": places | {"x": "other.bin"}}, "its index names other.bin, which is not in the same folder"),
        ({"weight_map": {"x": "../model.bin"}}, "names a file outside of the folder: ../model.bin"),
        ({"weight_map": {"x": index.name}}, "neither a file of safetensors nor one of torch.save"),
        ({"weight_map": [1]}, 'it is JSON, but not an index of weights with a "weight_map"'),
        ({"a": 1}, 'it is JSON, but not an index of weights with a "weight_map"'),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(DataError, match=re.escape(words)):
            read_contents(index)
    index.write_text(json.dumps({"weight_map": places}))
    (tmp_path / files[1]).write_bytes((tmp_path / files[1]).read_bytes()[:-9])
    with pytest.raises(DataError, match=f"{files[1]} is damaged. Copy or download it again"):
        read_contents(index)


def test_the_stem_is_that_of_the_weights(tmp_path: Path) -> None:
    options = {"size": 32}
    published = create_encoder("resnet10", **options, stem="imagenet")
    torch.save({"state_dict": under("module.encoder_q.", published.backbone.state_dict())}, tmp_path / "w.pth.tar")
    encoder = create_encoder("resnet10", **options, channels=1, init=tmp_path / "w.pth.tar")
    assert encoder.stem == "imagenet" and encoder.mean == ((0.485 + 0.456 + 0.406) / 3,)
    notes = " ".join(encoder.init_notes)
    assert "MoCo" in notes and "ImageNet (7x7" in notes and "conv1.weight from 3 to 1 channel" in notes
    encoder = create_encoder("resnet10", size=32, stem="cifar", init=tmp_path / "w.pth.tar")
    assert encoder.stem == "cifar" and "59 of 60 tensors fit" in encoder.init_notes[0]


def test_weights_of_timm_choose_the_stem_of_small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def published(name: str, size: int, channels: int, kwargs: dict[str, Any]) -> nn.Module:
        return timm.create_model("resnet18", layers=[1, 1, 1, 1], in_chans=channels, num_classes=0)

    monkeypatch.setattr(initial_weights, "pretrained", published)
    encoder = create_encoder("resnet10", size=32, channels=1, init="timm")
    assert encoder.stem == "imagenet" and len(encoder.mean) == 1
    notes = " ".join(encoder.init_notes)
    assert "timm's resnet18" in notes and "first convolution from 3 to 1 channels" in notes and "ImageNet (7x7" in notes
    encoder = create_encoder("resnet10", size=32, stem="cifar", init="timm")
    assert encoder.stem == "cifar" and "Initialised: conv1, because the CIFAR stem" in encoder.init_notes[0]


def test_the_encoder_of_a_file_is_recognised() -> None:
    def of(module: nn.Module) -> str | None:
        return likely_encoder(Contents(under("x.", module.state_dict()), {}))

    def on_meta(name: str) -> nn.Module:
        with torch.device("meta"):
            return timm.create_model(name, num_classes=0)

    assert of(on_meta("resnet34")) == "resnet34" and of(resnet(layers=(2, 2, 2, 2))) is None


@pytest.mark.slow
def test_usual_encoders_are_recognised(tmp_path: Path) -> None:
    for name in (
        "resnet18", "resnet50", "resnet101", "wide_resnet50_2", "vit_tiny_patch16_224", "vit_small_patch8_224",
        "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3",
    ):  # fmt: skip
        with torch.device("meta"):
            weights = timm.create_model(name, num_classes=0).state_dict()
        assert likely_encoder(Contents(under("x.", dict(weights)), {})) == name
    with torch.device("meta"):
        weights = timm.create_model("resnet26", num_classes=0).state_dict()
    assert likely_encoder(Contents(dict(weights), {})) is None
    torch.save(create_encoder("resnet10", size=224).backbone.state_dict(), tmp_path / "w.pth.tar")
    with pytest.raises(ConfigError, match=r"resnet18.*40 missing.*They are weights of resnet10"):
        create_encoder("resnet18", size=32, init=tmp_path / "w.pth.tar")


def hub_cache(folder: Path, name: str, files: dict[str, Any]) -> None:
    """Write a repository in the layout of the hub's cache."""
    repository = folder / f"models--{name.replace('/', '--')}"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for file, content in files.items():
        (repository / "snapshots" / "abc" / file).write_bytes(content)


def test_weights_of_the_hub_come_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    published = create_encoder("test_resnet", size=64)
    weights = safetensors.torch.save({k: v.contiguous() for k, v in published.backbone.state_dict().items()})
    config = b'{"architecture": "test_resnet", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}}'
    hub_cache(tmp_path, "owner/name", {"config.json": config, "model.safetensors": weights})
    encoder = create_encoder("test_resnet", size=64, init="hub:owner/name")
    assert_holds(encoder.backbone, dict(published.backbone.state_dict()))
    assert encoder.mean == (0.1, 0.2, 0.3) and "their configuration" in encoder.init_notes[1]
    assert initial_weights.is_named("hub:owner/name") and not initial_weights.is_named("owner/name")
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    assert create_encoder("test_resnet", size=64, init=snapshot).mean == (0.1, 0.2, 0.3)
    tensors = safetensors.torch.load(weights)
    halves = {"a.safetensors": [*tensors][::2], "b.safetensors": [*tensors][1::2]}
    parts = {file: safetensors.torch.save({k: tensors[k] for k in names}) for file, names in halves.items()}
    places = {name: file for file, names in halves.items() for name in names}
    index = json.dumps({"weight_map": places}).encode()
    hub_cache(tmp_path, "owner/large", {"model.safetensors.index.json": index} | parts)
    encoder = create_encoder("test_resnet", size=64, init="hub:owner/large")
    assert_holds(encoder.backbone, dict(published.backbone.state_dict()))
    with pytest.raises(ConfigError, match="hub:owner/other are not in a cache, and HF_HUB_OFFLINE is set"):
        create_encoder("test_resnet", size=64, init="hub:owner/other")
    with pytest.raises(ConfigError, match=r"there is no such repository; write hub:OWNER/NAME"):
        create_encoder("test_resnet", size=64, init="hub:a b/c/d")
