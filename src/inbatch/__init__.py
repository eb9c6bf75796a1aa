"""inbatch: self-supervised image learning with losses over the samples of a batch.

    run = inbatch.pretrain("photos/", method="simclr", epochs=100)
    features = inbatch.load(run.directory).embed(images)

All names below are imported on first use, so that `import inbatch` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inbatch import distributed as distributed
    from inbatch import losses as losses
    from inbatch import testing as testing
    from inbatch.api import (
        Run,
        dry_run,
        embed_run,
        evaluate_run,
        export_run,
        load,
        load_classifier,
        load_run,
        predict,
        prepare,
        pretrain,
        train_classifier,
    )
    from inbatch.apps.adaptation.adapt import adapt
    from inbatch.apps.collection.duplicates import find_duplicates
    from inbatch.apps.collection.labels import find_label_errors
    from inbatch.apps.collection.outliers import find_outliers
    from inbatch.apps.collection.search import search_images
    from inbatch.apps.collection.select import select_images
    from inbatch.apps.comparisons.compare import compare
    from inbatch.apps.reports.batch_context import inspect_run
    from inbatch.apps.reports.choose import choose_run
    from inbatch.apps.reports.dataset import survey_data
    from inbatch.apps.reports.explorer.explore import explore_features
    from inbatch.apps.reports.view_grid import draw_views
    from inbatch.data.views.module import views
    from inbatch.methods import METHODS
    from inbatch.models import Encoder
    from inbatch.runtime.tuning import tune
    from inbatch.training.cached_step import grad_cache
    from inbatch.training.callbacks import Callback, Moment
    from inbatch.training.optim import OPTIMIZERS
    from inbatch.training.own_requests import use_parts

    __version__: str

_API = (
    "Run", "dry_run", "embed_run", "evaluate_run", "export_run", "load", "load_classifier", "load_run", "predict",
    "prepare", "pretrain", "train_classifier",
)  # fmt: skip
_WHERE = dict.fromkeys(_API, "inbatch.api") | {"METHODS": "inbatch.methods", "Encoder": "inbatch.models"}
_WHERE |= dict.fromkeys(("Callback", "Moment"), "inbatch.training.callbacks")
_WHERE |= {"use_parts": "inbatch.training.own_requests"}
_WHERE |= {"adapt": "inbatch.apps.adaptation.adapt"}
_WHERE |= {"tune": "inbatch.runtime.tuning", "survey_data": "inbatch.apps.reports.dataset"}
_WHERE |= {"draw_views": "inbatch.apps.reports.view_grid", "inspect_run": "inbatch.apps.reports.batch_context"}
_WHERE |= {"choose_run": "inbatch.apps.reports.choose"}
_WHERE |= {"explore_features": "inbatch.apps.reports.explorer.explore"}
_WHERE |= {"compare": "inbatch.apps.comparisons.compare"}
_WHERE |= {"find_label_errors": "inbatch.apps.collection.labels", "select_images": "inbatch.apps.collection.select"}
_WHERE |= {"search_images": "inbatch.apps.collection.search"}
_WHERE |= {f"find_{name}": f"inbatch.apps.collection.{name}" for name in ("duplicates", "outliers")}
_WHERE |= {
    "OPTIMIZERS": "inbatch.training.optim",
    "views": "inbatch.data.views.module",
    "grad_cache": "inbatch.training.cached_step",
}
_MODULES = ("distributed", "losses", "testing")

__all__ = [
    "METHODS",
    "OPTIMIZERS",
    "Callback",
    "Encoder",
    "Moment",
    "Run",
    "__version__",
    "adapt",
    "choose_run",
    "compare",
    "distributed",
    "draw_views",
    "dry_run",
    "embed_run",
    "evaluate_run",
    "explore_features",
    "export_run",
    "find_duplicates",
    "find_label_errors",
    "find_outliers",
    "grad_cache",
    "inspect_run",
    "load",
    "load_classifier",
    "load_run",
    "losses",
    "predict",
    "prepare",
    "pretrain",
    "search_images",
    "select_images",
    "survey_data",
    "testing",
    "train_classifier",
    "tune",
    "use_parts",
    "views",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"inbatch.{name}")
    if name == "__version__":  # of the installed distribution: pyproject.toml is the only place that states it
        from importlib.metadata import version

        return version("inbatch")
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'inbatch' has no attribute {name!r}")
