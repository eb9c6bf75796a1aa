"""Shared settings of the tables of batch curation (Welle, Poklukar and Kragic 2021): SimCLR on CIFAR-10."""

from dataclasses import replace

from inbatch.apps.papers.scales import CIFAR10, FIGURES, usual
from inbatch.apps.papers.spec import Column, Scale, Settings

SOURCE = "Welle, Poklukar and Kragic 2021, ICML workshop"

# Section 2.2: batch 128, feature dimension 128, T 0.5, 500 epochs, k-NN with K = 200, linear for 100 epochs.
SIMCLR: Settings = {"method.name": "simclr", "method.temperature": 0.5, "method.out_dim": 128}
PAIRS: Settings = {"pairs": 1_000_000}
COUNTED = "crops"
"""Name of the data set for counting, which has no images: pairs of crops of 32 x 32 pixels are drawn and counted."""
LAPTOP: Settings = {"method.temperature": 0.2}
"""At scale laptop, the temperature of the preset fast, so that runs are shared with the tables of BA-SSL."""
HEADINGS = ("Linear", "K-NN", "patch")


def scales(*figures: str, patch: bool = False) -> dict[str, Scale]:
    """Return every scale; if `patch`, with a column of the counted mean area of a crop."""
    named = {"linear": "Linear", "k-NN": "K-NN"}
    common = usual(figures, views="simclr_cifar", gpu={"batch_size": 128})
    common["paper"] = Scale(
        tuple(Column(f"CIFAR-10, {figure}", "cifar10", FIGURES[figure], named[figure]) for figure in figures),
        {"cifar10": CIFAR10},
        {"epochs": 500, "batch_size": 128, "encoder.name": "resnet18", "evaluate_every": 10},
        seeds=(0,),
        cost="500 epochs of CIFAR-10 each; the paper: over 20 hours each on one GPU",
        differs=("the optimiser is not given: SimCLR's CIFAR preset", "the paper reports the best figure, we the last"),
    )
    if not patch:
        return common
    return {
        name: replace(
            scale,
            columns=(*scale.columns, Column("crop's mean area", COUNTED, "crops.area", "patch")),
            data={**scale.data, COUNTED: {"size": 32, "pairs": 10_000 if name == "smoke" else 1_000_000}},
        )
        for name, scale in common.items()
    }
