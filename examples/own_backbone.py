"""Use and train a backbone of your own.

    python examples/own_backbone.py

Any module that maps images (N, C, H, W) to rows (N, F) is an encoder. Pass it, or the class or function that makes it:
`channels` and `size` are then set by the run. Whoever loads the run passes the module again, or types its name:
`inbatch evaluate RUN --encoder own_backbone:PatchMLP`, in the folder of this file.
"""

import torch
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


def main() -> None:
    train, test = open_data("digits-canvas", "train"), open_data("digits-canvas", "test")

    torch.manual_seed(0)
    module = PatchMLP(1)
    encoder = Encoder(module, name="patch_mlp", size=20, channels=1)
    result = evaluate(encoder, train, test, protocols=["knn"], k=20)
    print(f"random weights: k-NN accuracy {result['knn']['top1']:.3f}")

    run = inbatch.pretrain("digits-canvas", encoder=module, epochs=1, quiet=True)
    print(f"trained: k-NN accuracy {run.result['evaluation']['knn']['top1']:.3f}")
    loaded = inbatch.load(run.directory, encoder=PatchMLP)
    print(f"loaded: {loaded.name}, width {loaded.width}")


if __name__ == "__main__":
    main()
