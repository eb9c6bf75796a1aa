"""Learn from a data set, with views, an optimizer and a callback of your own.

    python examples/own_data.py

Images come from any object with `__getitem__` and `__len__`; views are transforms of one uint8 image, with random
numbers that depend on the sample alone. Everything is exact as with the parts of the library: resumes and ranks.
"""

import torch
from torch import Tensor
from torch.utils.data import Dataset

import inbatch
from inbatch.data import open_data


class Digits(Dataset):
    """Labelled images; here from the embedded data, in yours from wherever they are."""

    def __init__(self) -> None:
        self.source = open_data("digits-canvas")

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.source.image(i), int(self.source.labels[i])  # uint8 (C, h, w); Pillow and NumPy work too


def shifted(image: Tensor) -> Tensor:
    """Move an image by up to 4 pixels, and add noise."""
    down, right = torch.randint(-4, 5, (2,)).tolist()
    moved = image.roll((down, right), dims=(1, 2)).float() / 255
    return (moved + 0.1 * torch.randn(moved.shape)).clamp(0, 1)


class StopWhenFlat(inbatch.Callback):
    """End the run if the loss has not fallen by 1 % over an epoch, and log its fall."""

    last = float("inf")

    def on_epoch(self, moment: inbatch.Moment) -> None:
        loss = float(moment.values["loss"])
        moment.log("fall", self.last - loss if self.last < float("inf") else 0.0)
        if loss > 0.99 * self.last:
            moment.stop(f"the loss is {loss:.3f} after {self.last:.3f}")
        self.last = loss


if __name__ == "__main__":
    run = inbatch.pretrain(
        Digits(), views=shifted, callbacks=[StopWhenFlat()], encoder="tiny", optimizer=torch.optim.NAdam,
        settings={"optimizer.lr": 2e-3}, batch_size=64, epochs=3, knn_k=20, quiet=True,
    )  # fmt: skip
    print(f"k-NN accuracy {run.result['evaluation']['knn']['top1']:.3f} after {run.result['steps']} steps")
    print(f"data: {run.recipe.data}, views: {run.recipe.views.name}")
