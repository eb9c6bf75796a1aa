"""The computation from uint8 images to features or probabilities as one traced program."""

import copy
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from inbatch.errors import ConfigError, reason
from inbatch.models.classifier import Classifier
from inbatch.models.encoder import Encoder
from inbatch.models.readout import Readout

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class FixedReadout(nn.Module):
    """A readout whose steps do not depend on its state, which a traced program could not follow."""

    mean: Tensor
    matrix: Tensor

    def __init__(self, readout: Readout) -> None:
        super().__init__()
        self.grid, self.width, self.fitted = readout.grid, readout.width, bool(int(readout.images))
        self.register_buffer("mean", readout.mean.clone())
        self.register_buffer("matrix", readout.matrix.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Pool and whiten as `Readout` does."""
        pooled = self._pooled(x) if x.ndim == 4 else x.repeat(1, self.grid**2)
        return (pooled - self.mean) @ self.matrix if self.fitted else pooled

    def _pooled(self, x: Tensor) -> Tensor:
        """Average over the parts of the grid, by slices: ONNX has no adaptive pooling for every size."""
        height, width = x.shape[2:]
        rows = [
            x[:, :, i * height // self.grid : -(-(i + 1) * height // self.grid)][
                :, :, :, j * width // self.grid : -(-(j + 1) * width // self.grid)
            ].mean((2, 3))
            for i in range(self.grid)
            for j in range(self.grid)
        ]
        return torch.stack(rows, 2).flatten(1)


class Graph(nn.Module):
    """Features (N, F) of images (N, C, size, size) with values from 0 to 255; normalisation and whitening included.

    Of a classifier: its calibrated probabilities (N, classes).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Encoder | Classifier) -> None:
        super().__init__()
        encoder = model.encoder if isinstance(model, Classifier) else model
        self.head = nn.Sequential()
        if isinstance(model, Classifier):
            self.head.extend([copy.deepcopy(model.head).cpu(), nn.Softmax(1)])
        self.encoder = copy.deepcopy(encoder).cpu().eval().requires_grad_(False)
        if encoder.readout is not None:
            self.encoder.readout = FixedReadout(encoder.readout)  # type: ignore[assignment]
        self.register_buffer("mean", torch.tensor(encoder.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(encoder.std).view(-1, 1, 1))

    def forward(self, images: Num[Tensor, "n c s s"]) -> Float[Tensor, "n f"]:
        rows: Tensor = self.head(self.encoder.represent((images.float() / 255 - self.mean) / self.std))
        return rows


def traced(
    model: Encoder | Classifier, dtype: torch.dtype = torch.uint8, batch: int | None = None
) -> "ExportedProgram":
    """Return `Graph` as a program of torch.export.

    Args:
        model: the encoder or classifier.
        dtype: type of the images.
        batch: number of images of every call; None: any number.

    Raises:
        ConfigError: if torch cannot trace it.
    """
    images = torch.zeros(batch or 2, model.channels, model.size, model.size, dtype=dtype)
    shapes = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    try:
        with torch.no_grad():
            program = torch.export.export(Graph(model).eval(), (images,), dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises any exception for code that it cannot trace
        raise ConfigError(
            f"torch.export cannot trace {model.name} ({reason(error)[:300]}): choose the target timm or torchvision, "
            "or another encoder"
        ) from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine, which the files would contain
    return program
