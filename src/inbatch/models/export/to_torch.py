"""Target `torch`: a program of torch.export, which torch runs without this package."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from inbatch.models.classifier import Classifier
from inbatch.models.encoder import Encoder
from inbatch.models.export.graph import traced
from inbatch.models.export.target import Written, compare, file_of, library


def write(model: Encoder | Classifier, folder: Path, facts: Mapping[str, Any]) -> Written:
    """Write encoder.pt2 (uint8 images of any number -> features), and compare its features.

    Of a classifier, classifier.pt2, with probabilities.
    """
    program, file = traced(model), file_of(model, ".pt2")
    torch.export.save(program, folder / file, extra_files={"inbatch.json": json.dumps(dict(facts))})
    module = torch.export.load(folder / file).module()
    with torch.no_grad():
        difference, largest = compare(model, module, f"the exported program of {model.name}")
    load = f"torch.export.load(OUT + '/{file}').module()(images)"
    return Written(library("torch"), difference, largest, load)
