"""A frozen encoder in the place of the target network: it takes the views of another encoder."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from inbatch.errors import ConfigError
from inbatch.models.encoder import Encoder
from inbatch.models.network import Network, norms


class Teacher(nn.Module):
    """A frozen encoder in evaluation mode that takes images prepared for another encoder.

    forward: (N, C, H, W), normalised for the student -> (N, width), the features that the encoder returns for use. The
    images are normalised for the teacher instead, and resized to its size. A teacher of three channels gets grey images
    in each of them.

    Args:
        encoder: the teacher.
        student: the encoder for which the images are prepared.

    Raises:
        ConfigError: if the teacher takes another number of channels.
    """

    encoder: Encoder
    factor: Tensor
    offset: Tensor

    def __init__(self, encoder: Encoder, student: Encoder) -> None:
        super().__init__()
        if encoder.channels != student.channels and (student.channels, encoder.channels) != (1, 3):
            raise ConfigError(
                f"the teacher {encoder.name} takes images of {encoder.channels} channels, and the images have "
                f"{student.channels}: choose another teacher, or --set channels={encoder.channels}"
            )
        self.encoder, self.width = encoder.requires_grad_(False), encoder.feature_width
        for norm in norms(encoder):
            norm.track_running_stats = False  # never updated: averages over groups and ranks leave them out
        mean, std, own_mean, own_std = (
            torch.tensor(x).view(-1, 1, 1) for x in (student.mean, student.std, encoder.mean, encoder.std)
        )
        self.register_buffer("factor", std / own_std, persistent=False)
        self.register_buffer("offset", (mean - own_mean) / own_std, persistent=False)
        self.train(False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        super().train(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.factor + self.offset
        if x.shape[-1] != self.encoder.size:
            x = interpolate(x, (self.encoder.size,) * 2, mode="bilinear", antialias=True)
        return self.encoder.represent(x)


class TeacherNetwork(Network):
    """A network of a teacher alone, with the rows "features"; always in evaluation mode, and it never changes.

    Args:
        teacher: the teacher.
        precision: as for `Network`.
        channels_last: as for `Network`.
    """

    def __init__(self, teacher: Teacher, precision: torch.dtype, channels_last: bool) -> None:
        super().__init__(teacher, {}, ("features",), precision, channels_last)

    @property
    def frozen_encoder(self) -> Encoder:
        """The encoder of the teacher."""
        teacher: Any = self.encoder
        encoder: Encoder = teacher.encoder
        return encoder

    def freeze_encoder(self, frozen: bool) -> None:
        """Do nothing: it is always frozen."""
