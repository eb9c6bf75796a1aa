"""A backbone with pooled features, and the preparation of its images."""

import math
import os
import warnings
from collections.abc import Sequence, Sized
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from inbatch.data.pixels import Levels
from inbatch.errors import ConfigError, DataError, type_name
from inbatch.models.feature_maps import stages
from inbatch.models.library_errors import explained
from inbatch.models.prepare import Prepare
from inbatch.models.readout import Readout
from inbatch.models.transform import Transform
from inbatch.nn.eval_mode import evaluating, in_pieces
from inbatch.runtime.isolation import usual_numerics

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

RAW = (
    "encoder(x) takes normalised images, (x - encoder.mean) / encoder.std for x from 0 to 1, but these have values "
    "from {:.2f} to {:.2f}: the features will be wrong. Pass encoder.preprocess(images) for uint8 images, or normalise."
)
"""Warning for images that are not normalised."""
MAX_SIDE = 4096
"""Maximum side of an encoder's images in pixels: a folder of unknown origin must not request all memory."""


def _numbers(values: Sequence[float] | None, default: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return mean or std as floats; ConfigError unless they are one finite number per channel."""
    try:
        numbers = tuple(map(float, default if values is None else values))
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != channels or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"mean and std need {channels} numbers each, one per channel, not {values!r:.60}.")
    return numbers


class Encoder(nn.Module):
    """A backbone with pooled features, and the properties of its input.

    forward: normalised float (N, channels, size, size) -> (N, width); `preprocess` makes them of uint8 images. In
    evaluation mode it warns once of images that are not normalised. ConfigError if the backbone does not return one row
    per image.

    Attributes:
        stem: "cifar" or "imagenet" for the ResNet family, else None.
        arguments: arguments that `create_encoder` passed to the model, None for a custom backbone.
        attend: name and options of the attention, None without.
        slots: names of the attention's blocks.
        pooled: the block after the pooling (`attention_slots.install` sets these three).
        readout: pools and whitens the output of `represent`; None: the features are unchanged.
        init_notes: sentences about its initial weights, if they come from another program or were adapted.
        lora: rank of LoRA in its frozen linear layers (`lora.add_lora`); None without.
        own: version and source hash of a backbone that is the user's code, None for others.
        levels: the two values that become 0 and 255 in images of more than 8 bits, as in the training images.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        name: str,
        size: int,
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        stem: str | None = None,
        arguments: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.backbone, self.name, self.stem = backbone, name, stem
        self.size, self.channels = size, channels
        self.mean = _numbers(mean, IMAGENET_MEAN if channels == 3 else (0.5,) * channels, channels)
        self.std = _numbers(std, IMAGENET_STD if channels == 3 else (0.25,) * channels, channels)
        if not min(self.std) > 0:
            raise ConfigError(f"std must be above 0, not {min(self.std)}: images are divided by it")
        self.prepare = Prepare(size, channels, self.mean, self.std)
        self.arguments = arguments
        self.attend: dict[str, Any] | None = None
        self.slots: tuple[str, ...] = ()
        self.own: dict[str, str | None] | None = None
        self.levels: Levels | None = None
        self.pooled: nn.Module | None = None
        self.lora: int | None = None
        self.readout: Readout | None = None
        self.init_notes: tuple[str, ...] = ()
        self._warned = False
        self.width = self._measure()

    @property
    def device(self) -> torch.device:
        first = next(self.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def feature_width(self) -> int:
        """Number of features returned for an image."""
        return self.width if self.readout is None else self.readout.width

    def forward(self, x: Float[Tensor, "n c s s"]) -> Float[Tensor, "n width"]:
        self._check_input(x)
        rows = self.backbone(x)
        return rows if self.pooled is None else self.pooled(rows)

    def represent(self, x: Float[Tensor, "n c s s"]) -> Float[Tensor, "n f"]:
        """Return the features for use and evaluation: those of `forward`, or the readout of the feature map."""
        if self.readout is None:
            return self(x)
        maps = getattr(self.backbone, "forward_features", None) if self.pooled is None else None
        output = self(x) if maps is None else maps(x)
        # The map can have other channels: channels last, or layers behind the pooling that change their number.
        usable = output.ndim in (2, 4) and output.shape[1] == self.width
        return self.readout(output if usable else self(x))

    @property
    def transform(self) -> Transform:
        """The preparation of one image, for data sets and loaders of PyTorch: (C, size, size) on the CPU."""
        return Transform(self.prepare, self.levels)

    def plain(self) -> AbstractContextManager[None]:
        """Return features without whitening within the context."""
        return nullcontext() if self.readout is None else self.readout.paused()

    def evaluating(self) -> AbstractContextManager[None]:
        """Set evaluation mode without gradient within the context."""
        return evaluating(self)

    @usual_numerics()
    def embed(self, images: Any, batch: int = 256) -> np.ndarray:
        """Return features (N, width) float32 of clean images.

        Args:
            images: tensor (N, C, H, W); array (N, H, W, C), (N, C, H, W) or (N, H, W); or a list of Pillow images,
                (C, h, w) tensors or (h, w, C) arrays of any sizes. Other types than uint8 are converted with `levels`.
                One such image alone is embedded as a list of one.
            batch: images at a time.

        Raises:
            DataError: if the images are of another form.
        """
        images = self.sequence(images)
        rows = []
        for start in range(0, len(images), batch):
            with self.evaluating():
                rows.append(in_pieces(self.represent, self.preprocess(images[start : start + batch])).float().cpu())
        return (
            torch.cat(rows).numpy()
            if rows
            else np.empty((0, self.readout.width if self.readout else self.width), np.float32)
        )

    @usual_numerics()
    def features(self, images: Any) -> list[Tensor]:
        """Return the feature maps (N, C, h, w) of clean images, in a form that `embed` takes, the finest first.

        `feature_maps.stages` describes them, and computes them with gradient. ConfigError if the backbone has none.
        """
        x = self.preprocess(images)
        with self.evaluating(), explained(self.name, "give feature maps", "Choose a ResNet or ViT", self.backbone):
            return stages(self.backbone, x)

    @usual_numerics()
    def tokens(self, images: Any) -> Float[Tensor, "n t d"]:
        """Return the patch tokens of clean images, or the last feature map row by row; see `features`."""
        return self.features(images)[-1].flatten(2).mT

    def preprocess(self, images: Any) -> Float[Tensor, "n c s s"]:
        """Return clean images resized, cropped and normalised, on the encoder's device, as `forward` takes them.

        Args:
            images: at least one image, in a form that `embed` takes.

        Raises:
            DataError: if there is none, or if they are of another form.
        """
        images = self.sequence(images)
        if not len(images):
            raise DataError("there is no image: pass at least one")
        if isinstance(images, np.ndarray) and images.ndim == 4 and images.shape[1] == self.channels:
            if images.dtype == np.uint8:  # torch takes neither negative strides nor read-only memory
                as_is = images.flags.writeable and min(images.strides) >= 0
                images = torch.from_numpy(images if as_is else images.copy())
            else:
                images = images.transpose(0, 2, 3, 1)
        if not isinstance(images, Tensor) or images.dtype != torch.uint8:
            images = [self.transform.pixels(i) for i in images]
        return self.prepare(images).to(self.device)

    def _check_input(self, x: Tensor) -> None:
        """Raise DataError for integers, and warn once, in evaluation mode, if the images seem not to be normalised."""
        if not x.is_floating_point():
            raise DataError(f"encoder(x) takes normalised float images, not {x.dtype}: pass encoder.preprocess(images)")
        if self.training or self._warned or torch.compiler.is_compiling() or x.is_meta or not x.numel():
            return
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        with suppress(RuntimeError):  # transformed tensors (vmap, fake) have no values
            low, high = (float(value) for value in x[0].detach().aminmax())
            whitest = max((1 - mean) / std for mean, std in zip(self.mean, self.std, strict=True))
            if low >= 0 and high - low >= 0.5 and (high <= 1 or high > whitest + 0.1):
                self._warned = True
                warnings.warn(RAW.format(low, high), UserWarning, stacklevel=5)

    def sequence(self, images: Any) -> Any:
        """Return images as a sequence: one alone as a list of one; raise DataError for what is none."""
        if self._is_one(images):
            return [images]
        path = isinstance(images, str | bytes | os.PathLike)
        if path or not (isinstance(images, Sized) and hasattr(images, "__getitem__")) or isinstance(images, dict):
            raise DataError(
                f"an encoder embeds a tensor, an array or a list of images, not {type_name(images)}"
                + ("; inbatch.embed_run(RUN, DATA, OUT) embeds the images of files" if path else "")
            )
        return images

    def _is_one(self, images: Any) -> bool:
        """Return whether this is one image: of Pillow, a (h, w) or (h, w, C) array, or a (C, h, w) tensor."""
        if not isinstance(images, np.ndarray | Tensor):
            return isinstance(images, Image.Image)
        if isinstance(images, Tensor):
            return images.ndim == 3 and images.shape[0] in (1, 3, self.channels)
        # (N, H, W) has the same number of sides; its last one is the width of the images.
        return images.ndim == 2 or (images.ndim == 3 and images.shape[2] in (1, 3, 4, self.channels))

    def _measure(self) -> int:
        shape = self.channels, self.size, self.size
        what = f"take images of {'x'.join(map(str, shape))}"
        with explained(self.name, what, backbone=self.backbone), self.evaluating():
            rows = self(torch.zeros(1, *shape, device=self.device))
        if not isinstance(rows, Tensor):
            raise ConfigError(
                f"{self.name} gives {type_name(rows)} for one image instead of one row of features: choose another "
                "encoder."
            )
        if rows.ndim != 2 or not rows.is_floating_point():
            kind = "" if rows.is_floating_point() else f" of {rows.dtype}"
            raise ConfigError(
                f"{self.name} gives {tuple(rows.shape)}{kind} for one image instead of one row of pooled "
                "features: choose an encoder with pooling."
            )
        return rows.shape[1]
