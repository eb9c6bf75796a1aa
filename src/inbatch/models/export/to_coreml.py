"""Target `coreml-ready`: a program with fixed shapes and a script, from which coremltools makes a Core ML model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from inbatch.errors import ConfigError
from inbatch.models.encoder import Encoder
from inbatch.models.export.graph import traced
from inbatch.models.export.target import Written, compare, library

FILE, SCRIPT = "encoder.pt2", "convert_to_coreml.py"
_LAYOUTS = {1: "GRAYSCALE", 3: "RGB"}

_CODE = '''"""Convert encoder.pt2 to encoder.mlpackage: pip install coremltools torch, then run this script.

The input is an image of {size} x {size} pixels ({layout}). The program contains the normalisation, so that scale is 1
and bias is 0. The output "features" has {width} numbers, in float16 by default.
"""

from pathlib import Path

import coremltools
import torch

here = Path(__file__).parent
program = torch.export.load(here / "encoder.pt2").run_decompositions({{}})
images = coremltools.ImageType(
    name="images", shape=(1, {channels}, {size}, {size}), scale=1.0, bias={bias},
    color_layout=coremltools.colorlayout.{layout},
)
model = coremltools.convert(
    program, inputs=[images], outputs=[coremltools.TensorType(name="features")],
    minimum_deployment_target=coremltools.target.iOS16,
)
model.save(str(here / "encoder.mlpackage"))
'''


def write(encoder: Encoder, folder: Path, facts: Mapping[str, Any]) -> Written:
    """Write encoder.pt2 (one image with float values from 0 to 255 -> features) and the script of the conversion."""
    if encoder.channels not in _LAYOUTS:
        raise ConfigError(
            f"Core ML takes images of 1 or 3 channels, and {encoder.name} takes {encoder.channels}: "
            "choose the target onnx"
        )
    torch.export.save(traced(encoder, torch.float32, batch=1), folder / FILE)
    values = {"size": encoder.size, "channels": encoder.channels, "width": encoder.feature_width}
    layout = _LAYOUTS[encoder.channels]
    bias = [0.0] * encoder.channels if encoder.channels > 1 else 0.0
    (folder / SCRIPT).write_text(_CODE.format(layout=layout, bias=bias, **values))
    module = torch.export.load(folder / FILE).module()

    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([module(one[None].float()) for one in images])

    difference, largest = compare(encoder, run, f"the exported program of {encoder.name}")
    return Written(library("torch"), difference, largest, f"python OUT/{SCRIPT}", more={"scale": 1.0, "bias": bias})
