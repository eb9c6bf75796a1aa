"""Weights of the package, by name: loaded, continued from, embedded with; and names that it does not have."""

from pathlib import Path
from typing import Any

import pytest
import torch

import inbatch
from inbatch.apps.adaptation.start import starting_settings
from inbatch.errors import ConfigError
from inbatch.models import create_encoder, save_encoder, shipped_weights
from inbatch.models.shipped_weights import weight_names, weights_folder, with_shipped
from inbatch.training.run_encoder import with_encoder_of_init


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the package have one encoder, `inbatch/small`; return the encoder."""
    torch.manual_seed(3)
    encoder = create_encoder("fast", size=16, width=8, check=False)
    save_encoder(encoder, tmp_path / "weights" / "small")
    monkeypatch.setattr(shipped_weights, "weights_folder", lambda: tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    return encoder


def test_a_name_loads_the_weights(shipped: Any, tmp_path: Path) -> None:
    images = torch.randint(0, 255, (3, 3, 16, 16), dtype=torch.uint8)
    expected = shipped.eval().embed(images)
    assert torch.equal(torch.as_tensor(inbatch.load("inbatch/small").embed(images)), torch.as_tensor(expected))
    again = create_encoder("fast", size=16, width=8, init="inbatch/small", check=False)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), shipped.parameters(), strict=True))
    assert with_encoder_of_init({"encoder.init": "inbatch/small"})["encoder.width"] == 8
    assert starting_settings("inbatch/small")["encoder.init"] == "inbatch/small"
    assert starting_settings("inbatch/small")["image_size"] == 16
    assert weight_names() == ["small"] and not (tmp_path / "inbatch").exists()


def test_features_are_not_kept_in_the_package(shipped: Any, tmp_path: Path) -> None:
    from PIL import Image

    from inbatch.apps.collection.features import open_collection

    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (80 * i, 10, 10)).save(tmp_path / "photos" / f"{i}.png")
    collection = open_collection("inbatch/small", tmp_path / "photos")
    assert len(collection) == 3 and collection.origin["file"] is None
    assert "cannot be kept in the package" in collection.notes[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "weights"]
    assert sorted(path.name for path in (tmp_path / "weights" / "small").iterdir()) == sorted(
        ["config.json", "model.safetensors"]
    )


def test_a_name_that_is_unknown_names_the_others(shipped: Any) -> None:
    with pytest.raises(ConfigError, match="no weights of this name in the package: it has inbatch/small"):
        inbatch.load("inbatch/smal")
    with pytest.raises(ConfigError, match="are weights of the package, not a run"):
        inbatch.evaluate_run("inbatch/small", "photos")
    with pytest.raises(
        ConfigError, match=r"is not the folder of a run: .*pass the output directory of inbatch pretrain"
    ):
        inbatch.load("elsewhere/small")


def test_a_folder_of_this_name_is_meant_first(shipped: Any, tmp_path: Path) -> None:
    save_encoder(create_encoder("fast", size=24, width=8, check=False), tmp_path / "inbatch" / "small")
    assert inbatch.load("inbatch/small").size == 24
    assert with_shipped(Path("inbatch/small")) == Path("inbatch/small")


def test_shipped_weights_have_a_record_and_a_hash() -> None:
    """Every folder has its record, and the hash in it is that of the file."""
    import hashlib
    import json

    for name in weight_names():
        folder = weights_folder() / name
        record = json.loads((folder / "record.json").read_text())
        assert record["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert {"command", "curve", "seed", "versions", "evaluation", "data", "licence"} <= record.keys()
        assert (folder / "model.safetensors").stat().st_size < 5e6
        encoder = inbatch.load(f"inbatch/{name}")
        rows = torch.as_tensor(encoder.embed(torch.zeros(2, 3, encoder.size, encoder.size, dtype=torch.uint8)))
        assert rows.shape[0] == 2 and bool(rows.isfinite().all())
