"""LoRA: only matrices of low rank and the heads learn; what a run leaves is a plain encoder."""

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_pool import on_ranks
from small_runs import assert_same_state, saved, stop_after, tiny
from torch import nn

import inbatch
from inbatch import api
from inbatch.errors import ConfigError, Preempted
from inbatch.models import create_encoder, load_encoder, save_encoder
from inbatch.models.encoder import Encoder
from inbatch.models.lora import add_lora, merge_, merged
from inbatch.models.network import Network, ema_update, make_target_network
from inbatch.nn.heads import Head
from inbatch.runtime import distributed
from inbatch.training import checkpoint
from inbatch.training.run_encoder import with_encoder_of_init

VIT: dict[str, Any] = {"patch_size": 5, "embed_dim": 12, "depth": 2, "num_heads": 2}
SMALL: dict[str, Any] = {"subset": 80, "batch_size": 24, "context": 8, "epochs": 2, "device": "cpu"}
METHODS: dict[str, dict[str, Any]] = {
    "simclr": {},
    "moco": {"method.queue_size": 48, "method.momentum": 0.9},
    "byol": {"method.hidden_dim": 8, "method.out_dim": 8, "method.momentum": 0.9},
    "dino": {"method.num_prototypes": 16, "method.hidden_dim": 8, "method.freeze_prototypes_epochs": 0},
}


def vit(channels: int = 3) -> Encoder:
    torch.manual_seed(0)
    return create_encoder("vit_tiny_patch16_224", size=20, channels=channels, **VIT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "encoder"
    save_encoder(vit(channels=1), path)  # the digits are grey
    return path


def settings_of(folder: Path, method: str, rank: int | None = 2) -> dict[str, Any]:
    own = {"encoder.init": str(folder), "encoder.lora": rank, "schedule.warmup_epochs": 0}
    return own | METHODS[method] | {"optimizer.name": "adamw", "optimizer.lr": 0.01, "schedule.scaling": "none"}


def built_of(folder: Path, method: str, **options: Any) -> Any:
    return api.prepare("digits-canvas", method, settings=settings_of(folder, method), **(SMALL | options))


def test_merged_weights_are_sums() -> None:
    w, a, b = torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)
    weights = {
        "x.fc.base_layer.weight": w, "x.fc.base_layer.bias": b[:, 0], "x.fc.lora_A.default.weight": a,
        "x.fc.lora_B.default.weight": b, "norm.weight": a[0],
    }  # fmt: skip
    result = merged(weights)
    assert list(result) == ["x.fc.weight", "x.fc.bias", "norm.weight"]
    torch.testing.assert_close(result["x.fc.weight"], w + b @ a)
    assert result["x.fc.bias"] is weights["x.fc.base_layer.bias"] and result["norm.weight"] is weights["norm.weight"]
    weights["x.fc.lora_B.default.weight"] = torch.zeros(3, 2)
    assert torch.equal(merged(weights)["x.fc.weight"], w)


def test_the_target_and_norm_layers_keep_frozen_weights() -> None:
    """An average of equal weights would differ by rounding; norm layers use their own statistics in training."""
    encoder: Any = nn.Sequential(nn.Linear(5, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    encoder[0].requires_grad_(False)
    encoder.lora = 1
    network = Network(encoder, {"projection": Head(nn.Linear(64, 3))}, ("projection",))
    target = make_target_network(network, {"projection": Head(nn.Linear(64, 3))}, ("projection",))
    before = copy.deepcopy(encoder.state_dict())
    network.train()
    with torch.no_grad():
        network.encoder[2].weight += 1
    for module in (network, target):
        module.freeze_encoder(True)
        module.freeze_encoder(False)
        module.features(torch.randn(8, 5))
    for _ in range(3):
        ema_update(target, network, 0.9)
    after = target.encoder.state_dict()
    assert_same_state({k: v for k, v in after.items() if k[0] in "0"}, {k: v for k, v in before.items() if k[0] in "0"})
    assert not torch.equal(after["2.weight"], before["2.weight"])
    for norm in (encoder[1], target.encoder[1]):
        assert not norm.training and torch.equal(norm.running_mean, torch.zeros(64))


def test_invalid_combinations_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(rank: Any = 2, **settings: Any) -> object:
        named = {key.replace("_", ".", 1): value for key, value in settings.items()}
        return api.prepare("digits-canvas", "simclr", settings={"encoder.lora": rank} | named, **SMALL)

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r'encoder.lora needs peft .*: pip install "inbatch\[lora\]"'):
        prepared(encoder_init=str(folder))
    with pytest.raises(ConfigError, match=r"these are random: name weights to start from \(--init\)"):
        prepared(encoder_name="tiny")
    for rank, message in ((0, "must be at least 1, not 0"), ("8x", "must be a whole number, not '8x'")):
        with pytest.raises(ConfigError, match=f"encoder.lora {message}"):
            prepared(rank, encoder_init=str(folder))
    for name, options, message in (
        ("fast", {"width": 4}, "fast has no linear layers"),
        ("tiny", {"attend": "se"}, "the blocks of attend.name=se could not learn"),
    ):
        with pytest.raises(ConfigError, match=message):
            add_lora(create_encoder(name, size=32, **options), 2)


def test_layers_whose_weights_are_read_elsewhere_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The projection of torch's multi-head attention is not called: matrices added to it would not learn."""
    monkeypatch.setitem(sys.modules, "peft", None)

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = x.mean(1).flatten(1)[:, :4] @ self.unused.weight
            return self.attention(rows, rows, rows)[0]

    with pytest.raises(ConfigError, match="no linear layers"):
        add_lora(Encoder(Attending(), name="mine", size=4), 2)


@pytest.mark.slow
def test_features_start_unchanged_and_merge_to_a_plain_encoder(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    encoder, plain = vit(), vit()
    images = torch.randn(3, 3, 20, 20)
    note = add_lora(encoder.eval(), 2)
    assert "rank 2 in 8 linear layers (qkv, proj, fc1, fc2): 768 parameters learn" in note
    torch.testing.assert_close(encoder(images), plain.eval()(images), rtol=0, atol=0)
    for parameter in (p for p in encoder.parameters() if p.requires_grad):
        parameter.data.normal_(0, 0.3)
    save_encoder(encoder, tmp_path / "saved")
    loaded, rows = load_encoder(tmp_path / "saved"), encoder(images)
    assert (rows - plain(images)).abs().max() > 0.1
    torch.testing.assert_close(loaded(images), rows, rtol=1e-4, atol=1e-5)
    merge_(encoder)
    assert_same_state(encoder.state_dict(), loaded.state_dict())
    assert list(encoder.state_dict()) == list(plain.state_dict()) and encoder.lora is None
    assert all(p.requires_grad for p in encoder.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_only_the_matrices_and_the_heads_learn(method: str, folder: Path) -> None:
    """In three context groups, with and without a target network."""
    pytest.importorskip("peft")
    built = built_of(folder, method)
    parts = {"network": built.network} | ({"target": built.target} if built.target else {})
    before = {n: {k: x.clone() for k, x in part.state_dict().items()} for n, part in parts.items()}
    batches = list(built.loader.epoch(0))
    for step, batch in enumerate(batches):
        built.step(batch, step)
    assert len(batches) > 1
    for name, part in parts.items():
        for key, value in part.state_dict().items():
            if key.startswith("encoder."):
                assert torch.equal(value, before[name][key]) != ("lora_" in key), (name, key)
        assert not all(torch.equal(x, before[name][k]) for k, x in part.state_dict().items() if k.startswith("heads."))
    held = [p for group in built.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in built.encoder.parameters() if p.requires_grad} < {id(p) for p in held}
    assert sum(p.numel() for p in built.encoder.parameters() if p.requires_grad) == 768


def state_of(folder: Path, method: str, context: int) -> dict[str, list]:
    """Train two steps in float64 with six groups in all; return all weights."""
    built = built_of(folder, method, context=context, precision="float32")
    for part in filter(None, (built.network, built.target)):
        part.double()
    built.step.call = distributed.wrap(built.network)  # its buffers for gradients have the type of the weights
    views = built.step.views
    built.step.views = lambda batch: tuple(x.double() for x in views(batch))
    for step, batch in zip(range(2), built.loader.epoch(0), strict=False):
        built.step(batch, step)
    modules = {"network": built.network} | ({"target": built.target} if built.target else {})
    return {f"{m}.{k}": x.tolist() for m, module in modules.items() for k, x in module.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_two_ranks_are_one_process(method: str, folder: Path) -> None:
    pytest.importorskip("peft")
    expected = state_of(folder, method, 4)
    assert any(np.any(np.array(x)) for key, x in expected.items() if "lora_B" in key)
    for state in on_ranks(2, state_of, folder, method, 4):
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(state[key], value, rtol=0, atol=1e-9, err_msg=key)


@pytest.mark.slow
def test_a_run_is_resumed_exactly_and_leaves_a_plain_encoder(
    folder: Path, tmp_path: Path, brief: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    options: dict[str, Any] = {"settings": settings_of(folder, "byol")}
    tiny("byol", tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Preempted):
            tiny("byol", tmp_path / "parts", **options)
    start = load_encoder(folder)
    with monkeypatch.context() as patch, pytest.warns(match="stopped at step"):
        patch.setitem(sys.modules, "peft", None)
        stopped = inbatch.load(tmp_path / "parts")
    state = checkpoint.load(tmp_path / "parts" / "checkpoints").state["network"]
    inside = {k.removeprefix("encoder.backbone."): v for k, v in state.items() if k.startswith("encoder.backbone.")}
    assert_same_state(dict(stopped.backbone.state_dict()), merged(inside))
    assert not torch.equal(stopped.backbone.blocks[0].mlp.fc1.weight, start.backbone.blocks[0].mlp.fc1.weight)
    assert torch.equal(stopped.backbone.blocks[0].norm1.weight, start.backbone.blocks[0].norm1.weight)
    tiny("byol", tmp_path / "parts", resume=True, **options)
    assert_same_state(saved(tmp_path / "parts"), saved(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        finished = inbatch.load(tmp_path / "whole")
        rows = finished.embed(torch.zeros(1, 1, 20, 20, dtype=torch.uint8))
        assert list(finished.state_dict()) == list(start.state_dict()) and np.isfinite(rows).all()
        assert "encoder.lora" not in with_encoder_of_init({"encoder.init": str(tmp_path / "whole")})
        inbatch.export_run(tmp_path / "whole", tmp_path / "export")
    last = checkpoint.load(tmp_path / "whole" / "checkpoints").state["network"]
    inside = {k.removeprefix("encoder.backbone."): v for k, v in last.items() if k.startswith("encoder.backbone.")}
    assert_same_state(dict(finished.backbone.state_dict()), merged(inside))
    assert_same_state(dict(load_encoder(tmp_path / "whole" / "initial").state_dict()), dict(start.state_dict()))
