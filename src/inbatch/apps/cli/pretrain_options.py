"""The options of `inbatch pretrain` as settings of a recipe."""

from collections.abc import Mapping
from typing import Any

from inbatch.apps.cli.app import assignments

_FIELDS = (
    "preset", "encoder", "views", "batch_size", "context", "epochs", "budget", "image_size", "optimizer", "precision",
    "seed", "fuse", "attend", "mix", "crops", "image_column", "label_column", "group_column", "negatives", "sampler",
    "teacher", "read",
)  # fmt: skip
"""Options that are settings of the same name."""


def pretrain_settings(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings by top-level name, and the dotted settings, of the options of `inbatch pretrain` by name."""
    chosen = {name: options[name] for name in _FIELDS}
    flags = ("compile", "shuffle_groups", "shard", "checkpoint_activations")
    chosen |= {name: options[name] or None for name in flags}
    chosen |= {"curate": "redraw" if options["curate"] else None}
    own = {"encoder.init": options["init"], "encoder.init_min_match": options["init_min_match"]}
    own |= {"optimizer.lr": options["lr"]}
    settings = {key: value for key, value in own.items() if value is not None} | assignments(options["set_"])
    return {key: value for key, value in chosen.items() if value is not None}, settings
