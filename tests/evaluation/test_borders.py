"""What is given to embed and evaluate is opened, or refused with a sentence."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inbatch.errors import ConfigError, DataError, InbatchError
from inbatch.evaluation import embed, evaluate, raw_pixels
from inbatch.models import create_encoder, load_encoder, save_encoder
from inbatch.training.replay import _CAPTURED, replay
from inbatch.training.run_encoder import with_encoder_of_init

IMAGES, LABELS = np.random.default_rng(0).integers(0, 255, (8, 3, 16, 16), dtype=np.uint8), np.arange(8) % 2


def test_arrays_pairs_and_folders_are_opened() -> None:
    encoder = create_encoder("tiny", size=16)
    plain, labelled = embed(encoder, IMAGES), embed(encoder, (IMAGES, LABELS))
    assert torch.equal(plain.vectors, labelled.vectors) and labelled.labels.tolist() == LABELS.tolist()
    evaluation = evaluate(encoder, (IMAGES, LABELS), (IMAGES, LABELS), protocols=("knn",), k=1)
    assert evaluation["knn"]["top1"] == 1.0 and len(raw_pixels(IMAGES)) == 8


def test_anything_else_is_refused_with_a_sentence() -> None:
    encoder = create_encoder("tiny", size=16)
    data: list[Any] = [None, 5, object(), (IMAGES,), [], {}, "no such folder", (IMAGES, LABELS, LABELS), float("nan")]
    for wrong in data:
        for call in (embed, evaluate):
            with pytest.raises(DataError, match=r"cannot be opened|does not exist|is empty"):
                call(*((encoder, wrong) if call is embed else (encoder, IMAGES, wrong)))
    for wrong in (None, "an encoder", torch.nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match="encoder must be an encoder"):
            embed(wrong, IMAGES)


def test_files_of_an_encoder_and_a_capture_of_another_shape(tmp_path: Path) -> None:
    save_encoder(create_encoder("tiny", size=16), tmp_path)
    file = tmp_path / "config.json"
    good = json.loads(file.read_text())
    own = good["inbatch"]
    deep = "[" * 3000 + "]" * 3000
    texts = ["", "[]", deep, '{"inbatch": ' + deep + "}", json.dumps({"inbatch": None})]
    changes: list[Any] = [[], "x", 3, own | {"arguments": "x"}, own | {"arguments": []}, own | {"size": {}}]
    changes += [own | {"name": None}, own | {"levels": 3}, own | {"sha256": None}]
    for text in (*texts, *(json.dumps(good | {"inbatch": change}) for change in changes)):
        file.write_text(text)
        with pytest.raises(InbatchError):
            load_encoder(tmp_path)
        try:
            with_encoder_of_init({"encoder.init": str(tmp_path)})
        except DataError as error:
            assert str(file) in str(error)
    capture = tmp_path / "capture.json"
    for record in ({}, dict.fromkeys(_CAPTURED), dict.fromkeys(_CAPTURED, "x")):
        capture.write_text(json.dumps(record))
        with pytest.raises(DataError, match="describes no captured step"):
            replay(tmp_path, torch.device("cpu"))
