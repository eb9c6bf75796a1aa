"""Use and train a backbone of your own.

    python examples/own_backbone.py

`Encoder` wraps any module that returns one row of features per image. To train it with `inbatch.pretrain`, register
a function that builds it in timm: the name then works as every other encoder name does. A program that loads the run
must import the module that registers the name first.
"""

import torch
from timm.models import register_model
from torch import Tensor, nn

import inbatch
from inbatch.data import open_data
from inbatch.evaluation import evaluate
from inbatch.models import Encoder


class PatchMLP(nn.Module):
    """Embed patches of 4 pixels, mix them by two linear layers, and take the maximum over positions."""

    def __init__(self, channels: int, width: int = 96) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, kernel_size=4, stride=2)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(self.patches(images)).amax((2, 3))


@register_model
def patch_mlp(pretrained: bool = False, in_chans: int = 3, **kwargs: object) -> PatchMLP:
    """Build the backbone as timm asks for it; `kwargs` holds num_classes, which is 0."""
    return PatchMLP(in_chans)


def main() -> None:
    train, test = open_data("digits-canvas", "train"), open_data("digits-canvas", "test")

    torch.manual_seed(0)
    encoder = Encoder(PatchMLP(1), name="patch_mlp", size=20, channels=1)
    result = evaluate(encoder, train, test, protocols=["knn"], k=20)
    print(f"random weights: k-NN accuracy {result['knn']['top1']:.3f}")

    run = inbatch.pretrain("digits-canvas", encoder="patch_mlp", epochs=1, quiet=True)
    print(f"trained: k-NN accuracy {run.result['evaluation']['knn']['top1']:.3f}, width {run.encoder.width}")


if __name__ == "__main__":
    main()
