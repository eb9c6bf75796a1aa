"""Embeddings in parts: the same bytes from one process, from several ranks, and after an interruption."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import on_ranks
from torch import Tensor

import inbatch
from inbatch.errors import ConfigError, DataError
from inbatch.evaluation import embedding_parts
from inbatch.evaluation.embeddings import Embeddings
from inbatch.models import create_encoder, save_encoder
from inbatch.runtime import distributed

IMAGES = torch.arange(90 * 64).mul(37).remainder(251).byte().view(90, 1, 8, 8)
"""Twelve parts of eight images, the last of two, in chunks of four."""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(create_encoder("tiny", size=8, channels=1), folder)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_parts, "BATCH", 4)
    monkeypatch.setattr(embedding_parts, "_CHUNKS", 2)


def embedded(encoder: Path, out: Path, images: Tensor = IMAGES, **options: Any) -> tuple[bytes, list[int]]:
    """Return the bytes of the file, and the first numbers of the chunks that this process has embedded."""
    chunks, real = [], embedding_parts.embed_stream

    def counting(*args: Any, **more: Any) -> Iterator[Embeddings]:
        for chunk in real(*args, **more):
            chunks.append(int(chunk.index[0]))
            yield chunk

    embedding_parts.embed_stream = counting  # type: ignore[assignment]
    try:
        assert inbatch.embed_run(encoder, images, out, **options) == len(images)
    finally:
        embedding_parts.embed_stream = real
    return out.read_bytes(), chunks


def interrupted(encoder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, at: int = 40) -> None:
    """Stop a command in the chunk of an image."""
    real = embedding_parts.embed_stream

    def stopping(*args: Any, **more: Any) -> Iterator[Embeddings]:
        for chunk in real(*args, **more):
            if at in chunk.index:
                raise KeyboardInterrupt
            yield chunk

    with monkeypatch.context() as changed, pytest.raises(KeyboardInterrupt):
        changed.setattr(embedding_parts, "embed_stream", stopping)
        inbatch.embed_run(encoder, IMAGES, out)


def on_rank(encoder: Path, folder: Path) -> tuple[bytes, list[int], str]:
    embedding_parts.BATCH, embedding_parts._CHUNKS = 4, 2
    content, chunks = embedded(encoder, folder / "ranks.npz")
    images = IMAGES.clone()
    images[3] += 0 if distributed.rank() else 1  # arrays are compared by names and labels, not by pixels
    try:
        inbatch.embed_run(encoder, images[: 90 - distributed.rank()], folder / "other.npz")
    except ConfigError as error:
        return content, chunks, str(error)
    return content, chunks, "went on"


def test_two_ranks_write_the_file_of_one_and_none_twice(encoder: Path, tmp_path: Path) -> None:
    alone, chunks = embedded(encoder, tmp_path / "alone.npz")
    first, second = on_ranks(2, on_rank, encoder, tmp_path)
    assert first[0] == second[0] == alone
    assert chunks == first[1] + second[1] == list(range(0, 90, 4)) and min(map(len, (first[1], second[1]))) > 8
    assert not list(tmp_path.glob("*.parts"))
    for _, _, error in (first, second):
        assert "disagree about the images: rank 1 has a different one from rank 0" in error


def test_finished_parts_of_an_interrupted_command_are_reused(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    alone, _ = embedded(encoder, tmp_path / "alone.npz")
    out = tmp_path / "features.npz"
    interrupted(encoder, out, monkeypatch)
    assert len(list((tmp_path / "features.npz.parts").glob("*.safetensors"))) == 5 and not out.exists()
    (tmp_path / "features.npz.parts" / "000001.safetensors").write_bytes(b"cut off")
    content, chunks = embedded(encoder, out, quiet=False)
    assert content == alone and chunks == [8, 12, *range(40, 90, 4)]
    assert "32 images embedded by an earlier command" in capfd.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "features.npz.parts").exists()


def test_parts_of_other_features_are_not_used(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "other", tmp_path / "features.npz"
    torch.manual_seed(1)
    save_encoder(create_encoder("tiny", size=8, channels=1), other)
    interrupted(encoder, out, monkeypatch)
    content, chunks = embedded(other, out, quiet=False)
    assert len(chunks) == 23 and content == embedded(other, tmp_path / "alone.npz")[0]
    assert "features of another encoder: they are removed" in capfd.readouterr().err.replace("\n", " ")


def test_interrupted_command_without_a_finished_part_leaves_no_files(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(encoder, tmp_path / "features.npz", monkeypatch, at=2)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_an_error_before_an_image_is_embedded(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.parquet or \.npz"):
        inbatch.embed_run(encoder, IMAGES, tmp_path / "features.csv")
    assert not list(tmp_path.iterdir())


def test_unreadable_images_are_named_after_an_interruption(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inbatch.data import open_data, write_folder

    folder = write_folder(open_data((IMAGES, torch.zeros(90).long())), tmp_path / "images")
    files = sorted(folder.rglob("*.png"))
    files[5].write_bytes(b"damaged")
    out, missing = tmp_path / "features.npz", dict[int, str]()
    real = embedding_parts.write_embeddings

    def full(*args: Any) -> int:
        raise DataError("a full disk")

    with monkeypatch.context() as changed, pytest.raises(DataError, match="full disk"):
        changed.setattr(embedding_parts, "write_embeddings", full)
        inbatch.embed_run(encoder, folder, out, missing=missing)
    assert real is embedding_parts.write_embeddings
    again: dict[int, str] = {}
    assert inbatch.embed_run(encoder, folder, out, missing=again) == 89
    assert list(again) == [5] and files[5].name in again[5]


def test_a_rank_that_does_not_see_the_folder_is_named(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "broadcast_object", lambda plan: ("of another folder", plan[1]))
    with pytest.raises(ConfigError, match=r"rank 0 does not see the folder .*features\.npz\.parts of rank 0"):
        inbatch.embed_run(encoder, IMAGES, tmp_path / "features.npz")
