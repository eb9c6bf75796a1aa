"""An encoder with few operations at 32 to 96 pixels: it learns the most within an hour on a CPU."""

from torch import Tensor, nn

from inbatch.models.whitened_patches import WhitenedPatches


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Fast(nn.Module):
    """A ResNet-9 with strides instead of pooling (after Page 2018, "How to train your ResNet"): (N, C, H, W) -> (N, F).

    Four stages of `width` times 1, 2, 4 and 8 channels, each half as large as the one before; the last `blocks` of them
    have a residual block of two convolutions. The stem has stride 1 up to 40 pixels, 2 up to 96, and 4 above, so that
    the first stage has about 32 pixels for images of any size.

    Args:
        channels: channels of the images.
        size: side of the images in pixels.
        width: channels of the first stage.
        blocks: number of residual blocks.
        whiten_patches: the stem is a frozen layer that whitens patches of the training images, and a 1x1 convolution.
    """

    def __init__(
        self, channels: int, size: int, width: int = 32, blocks: int = 1, whiten_patches: bool = False
    ) -> None:
        super().__init__()
        if not 0 <= blocks <= 3 or width < 1:
            raise ValueError(f"width {width} and blocks {blocks}: a width of at least 1, and 0 to 3 blocks")
        stem = 1 if size <= 40 else 2 if size <= 96 else 4
        kernel = 3 if stem < 4 else 7
        layers: list[nn.Module] = [_convolution(channels, width, stem, kernel)]
        if whiten_patches:
            patches = WhitenedPatches(channels, kernel=kernel, stride=stem)
            layers = [nn.Sequential(patches, _convolution(patches.width, width, kernel=1))]
        for stage in range(1, 4):
            before, after = width * 2 ** (stage - 1), width * 2**stage
            layers.append(_convolution(before, after, 2))
            if stage > 3 - blocks:
                layers.append(Residual(nn.Sequential(_convolution(after, after), _convolution(after, after))))
        self.stages = nn.Sequential(*layers)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, (N, F, h, w)."""
        return self.stages(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).mean((2, 3))


def _convolution(fan_in: int, fan_out: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    convolution = nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(fan_out), nn.ReLU(inplace=True))
