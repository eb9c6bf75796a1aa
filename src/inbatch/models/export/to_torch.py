"""Target `torch`: a program of torch.export, which torch runs without this package."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from inbatch.models.encoder import Encoder
from inbatch.models.export.graph import traced
from inbatch.models.export.target import Written, compare, library

FILE = "encoder.pt2"


def write(encoder: Encoder, folder: Path, facts: Mapping[str, Any]) -> Written:
    """Write encoder.pt2 (uint8 images of any number -> features), and compare its features."""
    program = traced(encoder)
    torch.export.save(program, folder / FILE, extra_files={"inbatch.json": json.dumps(dict(facts))})
    module = torch.export.load(folder / FILE).module()
    with torch.no_grad():
        difference, largest = compare(encoder, module, f"the exported program of {encoder.name}")
    load = f"torch.export.load(OUT + '/{FILE}').module()(images)"
    return Written(library("torch"), difference, largest, load)
