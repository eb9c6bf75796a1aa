"""Shared methods and settings of the tables of BA-SSL (Zhang and Liu 2023, arXiv 2311.09974)."""

from inbatch.apps.papers.spec import Settings

SOURCE = "Zhang and Liu 2023, arXiv 2311.09974"
INTERPRETATION = "no code of the paper is public: batch fusion is our interpretation of it (docs/context/fuse.md)"

# Section 4.1: batch 256, hidden 4096, out 256, T 0.2, m 0.99, learning rate 1.5e-4, 40 epochs of warm-up. The optimiser
# is not named; these are MoCo v3's values for AdamW.
PUBLISHED: Settings = {"batch_size": 256, "encoder.name": "resnet18", "epochs": 300}

MOCO: Settings = {"method.name": "moco", "method.layers": 2}
SYMMETRIC: Settings = {**MOCO, "method.symmetric": True}
"""The loss of Algorithm 1: plain and fused views are both queries and keys.

MoCo v2's own loss has one query, which would be the fused view: no plain view would be learned from.
"""
LIGHT: Settings = {**SYMMETRIC, "method.smooth": 0.2}
"""Light-MoCo (Lin et al. 2023, arXiv 2212.07158): MoCo v2 for small encoders, with its smoothed InfoNCE."""
BYOL: Settings = {"method.name": "byol"}
SIMCLR: Settings = {"method.name": "simclr"}
SIMSIAM: Settings = {"method.name": "simsiam"}
FUSED: Settings = {"fuse.name": "conv"}
OURS: Settings = {"method.name": "mocov3", **FUSED}
"""Algorithm 1: two views, the second fused; symmetric in-batch loss, momentum keys: MoCo v3 with fusion."""
OURS_PUBLISHED: Settings = {
    "method.hidden_dim": 4096, "method.out_dim": 256, "method.temperature": 0.2, "method.momentum": 0.99,
    "optimizer.name": "adamw",
    "optimizer.lr": 1.5e-4, "schedule.warmup_epochs": 40, "fuse.relu": True,
}  # fmt: skip
