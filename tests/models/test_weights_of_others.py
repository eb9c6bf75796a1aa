"""DINOv3 of transformers, CLIP and sharded checkpoints as initial weights, against the programs that write them."""

import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import QuickGELU
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, _convert_openai_clip
from torch import Tensor, nn

from inbatch.errors import ConfigError, DataError
from inbatch.models import create_encoder
from inbatch.models.exact_weights import check_exact
from inbatch.models.likely_encoder import likely_encoder
from inbatch.models.published_weights import load, match
from inbatch.models.weight_files import Contents, read_contents

Tensors = dict[str, Tensor]
WIDTH = 16


def filled(module: nn.Module) -> nn.Module:
    """Return a module whose tensors are all random, also those that are 0 or 1 at the start."""
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.copy_(0.3 * torch.randn_like(tensor))
    return module.eval()


def loaded(backbone: nn.Module, tensors: Tensors, **values: str) -> str:
    return load(backbone, match(backbone, Contents(tensors, dict(values)), 3), "vit", "w.pth", 0.95)


def eva(**options: Any) -> nn.Module:
    """Return timm's DINOv3, small."""
    return Eva(
        img_size=32, patch_size=8, dynamic_img_size=True, embed_dim=WIDTH, depth=2, num_heads=2, init_values=1e-5,
        rope_type="dinov3", rope_temperature=100, rope_rotate_half=True, use_rot_pos_emb=True, use_abs_pos_emb=False,
        num_reg_tokens=4, use_fc_norm=False, norm_layer=partial(nn.LayerNorm, eps=1e-5), num_classes=0,
        global_pool="token", **options,
    ).eval()  # fmt: skip


@pytest.mark.slow  # the import of transformers takes seconds
@pytest.mark.parametrize("gated", [False, True])
def test_dinov3_of_transformers_computes_the_same_in_timm(gated: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ViTConfig(
        image_size=32, patch_size=8, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=4 * WIDTH, num_register_tokens=4, use_gated_mlp=gated, hidden_act="silu" if gated else "gelu",
    )  # fmt: skip
    theirs = filled(transformers.DINOv3ViTModel(config))
    options = {"swiglu_mlp": True, "swiglu_align_to": 8} if gated else {}
    backbone, images = eva(qkv_bias=True, **options), torch.randn(2, 3, 32, 32)
    sentence = loaded(backbone, dict(theirs.state_dict()))
    assert "DINOv3 of transformers" in sentence and "missing" not in sentence, sentence
    with torch.no_grad():
        assert torch.allclose(backbone(images), theirs(images).pooler_output, atol=1e-5)
    published = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    again = eva(qkv_bias=True, **options)
    loaded(again, published)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), backbone.parameters(), strict=True))
    with pytest.raises(ConfigError, match="biases of queries and values, and vit has none: choose vit_qkvb"):
        check_exact(eva(qkv_bias=False, **options), "vit", Contents(published, {}))
    none = {name: tensor.zero_() if "_proj.bias" in name else tensor for name, tensor in published.items()}
    assert check_exact(eva(qkv_bias=False, **options), "vit", Contents(none, {})) == []


def clip_vit(act: Any = nn.GELU, **options: Any) -> nn.Module:
    """Return timm's vision transformer of CLIP, small."""
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=2, num_classes=0, act_layer=act,
        norm_layer=partial(nn.LayerNorm, eps=1e-5), **{"pre_norm": True} | options,
    ).eval()  # fmt: skip


def test_dinov3_by_the_names_of_transformers_is_that_of_timms_conversion() -> None:
    """Written from the names of the authors, which timm converts; their key bias is 0 and does not exist here."""
    authors: Tensors = {}
    for name, tensor in filled(eva(qkv_bias=True)).state_dict().items():
        name = name.replace("gamma_", "ls").replace("reg_token", "storage_tokens")
        name = f"{name}.gamma" if name.endswith(("ls1", "ls2")) else name
        if name.endswith("q_bias"):
            authors[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, 0 * tensor, tensor + 1])
        elif not name.endswith("v_bias"):
            authors[name] = tensor
    theirs: Tensors = {"embeddings.mask_token": torch.zeros(1, 1, WIDTH)}
    for name, tensor in authors.items():
        for old, new in (("blocks.", "layer."), ("attn.proj", "attention.o_proj"), ("mlp.fc1", "mlp.up_proj"),
                         ("mlp.fc2", "mlp.down_proj"), ("ls1.gamma", "layer_scale1.lambda1"),
                         ("ls2.gamma", "layer_scale2.lambda1"), ("storage_tokens", "embeddings.register_tokens"),
                         ("cls_token", "embeddings.cls_token"),
                         ("patch_embed.proj", "embeddings.patch_embeddings")):  # fmt: skip
            name = name.replace(old, new)
        parts = zip("qkv", tensor.chunk(3), strict=True) if "qkv" in name else ()
        theirs |= {name.replace("attn.qkv", f"attention.{part}_proj"): one for part, one in parts}
        theirs |= {} if "qkv" in name else {name: tensor}
    theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith("k_proj.bias")}
    backbone, reference = eva(qkv_bias=True), eva(qkv_bias=True)
    assert "DINOv3 of transformers" in loaded(backbone, theirs)
    assert "DINOv3, backbone" in loaded(reference, authors)
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), reference.parameters(), strict=True))


class OpenClip(nn.Module):
    """The vision tower of open_clip by its names, with a text tower's blocks beside it."""

    def __init__(self) -> None:
        super().__init__()

        def block(width: int) -> nn.Module:
            one = nn.Module()
            one.ln_1, one.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            one.attn = nn.MultiheadAttention(width, 2)
            one.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
            return one

        def transformer(width: int) -> nn.Module:
            return nn.ModuleDict({"resblocks": nn.ModuleList(block(width) for _ in range(2))})

        self.visual = nn.ModuleDict({"transformer": transformer(WIDTH)})
        self.visual.conv1 = nn.Conv2d(3, WIDTH, 8, 8, bias=False)
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.visual.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.visual.positional_embedding = nn.Parameter(torch.zeros(17, WIDTH))
        self.visual.proj = nn.Parameter(torch.zeros(WIDTH, 8))
        self.transformer, self.positional_embedding = transformer(24), nn.Parameter(torch.zeros(77, 24))


def test_clip_of_open_clip_is_that_of_timms_conversion() -> None:
    tensors = dict(filled(OpenClip()).state_dict())
    backbone, reference = clip_vit(), clip_vit()
    theirs = _convert_openai_clip(tensors, reference)
    reference.load_state_dict({k: v for k, v in theirs.items() if not k.startswith("head.")})
    sentence = loaded(backbone, tensors)
    assert (
        "(CLIP, vision tower): 31 of 31 tensors fit" in sentence
        and "text tower: positional_embedding (1), transformer (24)" in sentence
    )
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), reference.parameters(), strict=True))
    [note] = check_exact(backbone, "vit_base_patch16_clip_224", Contents(tensors, {}))
    assert "does not state the activation" in note and "computes GELU" in note
    with pytest.raises(
        ConfigError, match=r"layer norm before the blocks \(ln_pre\), and vit_small_patch16_224 has none"
    ):
        check_exact(clip_vit(pre_norm=False), "vit_small_patch16_224", Contents(tensors, {}))
    openai = tensors | {name: torch.tensor(1) for name in ("context_length", "input_resolution", "vocab_size")}
    with pytest.raises(ConfigError, match="computes GELU: choose vit_base_patch16_clip_quickgelu_224"):
        check_exact(backbone, "vit_base_patch16_clip_224", Contents(openai, {}))
    assert check_exact(clip_vit(QuickGELU), "vit_base_patch16_clip_quickgelu_224", Contents(openai, {})) == []


@pytest.mark.slow
@pytest.mark.parametrize(("act", "layer"), [("quick_gelu", QuickGELU), ("gelu", nn.GELU)])
def test_clip_of_transformers_computes_the_same_in_timm(act: str, layer: type[nn.Module]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        image_size=32, patch_size=8, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=4 * WIDTH, hidden_act=act,
    )  # fmt: skip
    theirs, images = filled(transformers.CLIPVisionModel(config)), torch.randn(2, 3, 32, 32)
    backbone, tensors = clip_vit(layer), dict(theirs.state_dict())
    assert "(CLIP of transformers, vision tower): 31 of 31" in loaded(backbone, tensors)
    with torch.no_grad():
        assert torch.allclose(backbone(images), theirs(images).pooler_output, atol=1e-5)
    stated = Contents(tensors, {"hidden_act": act})
    assert check_exact(backbone, "vit_base_patch16_clip_224", stated) == []
    other = clip_vit(nn.GELU if layer is QuickGELU else QuickGELU)
    name = "vit_base_patch16_clip_224" if layer is QuickGELU else "vit_base_patch16_clip_quickgelu_224"
    with pytest.raises(ConfigError, match=f"activation {act}, and .*choose vit_base_patch16_clip_"):
        check_exact(other, name, stated)
    with pytest.raises(ConfigError, match="the activation relu, which timm's encoders of CLIP lack"):
        check_exact(backbone, name, Contents(tensors, {"hidden_act": "relu"}))


@pytest.mark.slow
def test_the_encoder_of_clip_is_recognised() -> None:
    with torch.device("meta"):
        backbone = VisionTransformer(img_size=224, patch_size=32, embed_dim=768, num_classes=0, pre_norm=True)
    names = {"norm_pre": "visual.ln_pre", "norm": "visual.ln_post", "patch_embed.proj": "visual.conv1"}
    tensors: Tensors = {}
    for name, value in backbone.state_dict().items():
        head, _, last = name.rpartition(".")
        if name.startswith("blocks."):
            for ours, theirs in (("blocks.", "visual.transformer.resblocks."), ("norm", "ln_"), ("qkv.", "in_proj_"),
                                 ("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"),
                                 ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
                name = name.replace(ours, theirs)
            tensors[name] = value
        elif head in names and name != "patch_embed.proj.bias":
            tensors[f"{names[head]}.{last}"] = value
    tensors |= {"visual.class_embedding": torch.empty(768, device="meta"),
                "visual.positional_embedding": torch.empty(50, 768, device="meta")}  # fmt: skip
    assert likely_encoder(Contents(tensors, {})) == "vit_base_patch32_clip_224"
    assert likely_encoder(Contents(tensors, {"hidden_act": "quick_gelu"})) == "vit_base_patch32_clip_quickgelu_224"


def sharded(folder: Path, state: dict[str, Any]) -> Path:
    """Write a folder of `torch.distributed.checkpoint`, as FSDP and torchtitan do."""
    from torch.distributed import checkpoint

    checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def test_a_sharded_checkpoint_is_read_without_running_its_pickles(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = create_encoder("tiny", size=20, channels=3)
    weights = encoder.backbone.state_dict()
    folder = sharded(
        tmp_path / "step-10", {"model": dict(weights), "optim": {"state": {"m": torch.ones(3)}}, "step": 10}
    )
    assert len(list(folder.glob("*.distcp"))) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = read_contents(folder).tensors
    assert set(tensors) == {f"model.{name}" for name in weights}
    assert all(torch.equal(tensors[f"model.{name}"], value) for name, value in weights.items())
    again = create_encoder("tiny", size=20, channels=3, init=folder)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), encoder.parameters(), strict=True))
    (folder / ".metadata").write_bytes(pickle.dumps(Harmful(tmp_path / "executed")))
    with pytest.raises(DataError, match=r"refers to builtins\.eval|refers to pathlib"):
        read_contents(folder)
    assert not (tmp_path / "executed").exists()
    (folder / ".metadata").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read as weights"):
        read_contents(folder)


class Harmful:
    """An object whose pickle writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.marker)!r}, 'w')",)


def test_a_sharded_checkpoint_names_no_file_elsewhere(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "step", {"w": torch.ones(3)})
    index = folder / ".metadata"
    index.write_bytes(index.read_bytes().replace(b"\x8c\x0c__0_0.distcp", b"\x8c\x0c../../etc/pw"))
    with pytest.raises(DataError, match="names a file outside of the folder"):
        read_contents(folder)


def test_names_of_wrapped_modules_are_found(tmp_path: Path) -> None:
    """A consolidated state dict of FSDP 1 with activation checkpointing, whose wrappers are within the names."""
    torch.manual_seed(0)
    encoder = create_encoder("tiny", size=20, channels=3)
    wrapped = {
        "_fsdp_wrapped_module." + name.replace(".", "._fsdp_wrapped_module._checkpoint_wrapped_module.", 1): tensor
        for name, tensor in encoder.backbone.state_dict().items()
    }
    torch.save({"model": wrapped}, tmp_path / "w.pt")
    again = create_encoder("tiny", size=20, channels=3, init=tmp_path / "w.pt")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), encoder.parameters(), strict=True))


@pytest.mark.parametrize("size", [0x80, 0x280, 0x4B50, 0x8B1F])
def test_files_of_safetensors_whose_header_length_begins_as_another_format_are_read(tmp_path: Path, size: int) -> None:
    header = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(size)
    content = size.to_bytes(8, "little") + header + torch.tensor([1.0, 2.0]).numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    assert read_contents(tmp_path / "model.safetensors").tensors["x"].tolist() == [1.0, 2.0]
