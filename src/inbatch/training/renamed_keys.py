"""Old names of recipe settings and their new names."""

from collections.abc import Iterable

from inbatch.errors import ConfigError

_METHOD = {
    "m": "momentum",
    "out": "out_dim",
    "hidden": "hidden_dim",
    "bottleneck": "bottleneck_dim",
    "prediction": "pred_hidden_dim",
    "queue": "queue_size",
    "queue_from": "queue_start_epoch",
    "prototypes": "num_prototypes",
    "frozen": "freeze_prototypes_epochs",
    "clusters": "num_clusters",
    "classes": "num_classes",
    "warmup": "warmup_epochs",
    "fix_lr": "fix_pred_lr",
    "offdiagonal": "lambd",
    "sim": "sim_coeff",
    "std": "std_coeff",
    "cov": "cov_coeff",
    "teach": "targets",
    "anchors": "contrast_mode",
    "smoothing": "label_smoothing",
}
_VIEWS = {"area": "min_scale", "views": "num_views", "small": "num_small_crops", "large": "num_large_crops"}

RENAMED: dict[str, str] = {
    "batch": "batch_size",
    "size": "image_size",
    "k": "knn_k",
    "resident": "cache_on_device",
    "max_bad": "max_unreadable",
    "variance": "variance_weight",
    "joined": "joint_norm",
    "schedule.warmup": "schedule.warmup_epochs",
    **{f"method.{old}": f"method.{new}" for old, new in _METHOD.items()},
    **{f"views.{old}": f"views.{new}" for old, new in _VIEWS.items()},
    "attend.hidden": "attend.hidden_dim",
}
"""Old name of a setting -> new name."""


def check_not_renamed(key: str, owner: str = "", known: Iterable[str] | None = None) -> None:
    """Raise ConfigError that names the new key if a key has been renamed.

    Args:
        key: The key.
        owner: What has the settings `known`, for the message.
        known: Settings without their part; None if it is unknown which there are.
    """
    if key in RENAMED and known is not None and RENAMED[key].split(".")[-1] not in known:
        raise ConfigError(f"the setting {key!r} is now {RENAMED[key]!r}, which {owner} does not have: leave it out")
    if key in RENAMED:
        raise ConfigError(f"the setting {key!r} is now {RENAMED[key]!r}: rename it")
