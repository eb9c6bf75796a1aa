"""inbatch: learn image features by letting the samples of a batch teach each other.

    run = inbatch.pretrain("photos/", method="simclr", epochs=100)
    features = inbatch.load(run.directory).embed(images)

Everything below is imported when it is first used, so that `import inbatch` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inbatch import losses as losses
    from inbatch.api import Run, draw_views, embed_run, evaluate_run, export_run, load, load_run, pretrain, rehearse
    from inbatch.encoders import Encoder
    from inbatch.methods import METHODS
    from inbatch.process import tune
    from inbatch.survey.look import survey_data

_API = ("Run", "draw_views", "embed_run", "evaluate_run", "export_run", "load", "load_run", "pretrain", "rehearse")
_WHERE = dict.fromkeys(_API, "inbatch.api") | {"METHODS": "inbatch.methods", "Encoder": "inbatch.encoders"}
_WHERE |= {"tune": "inbatch.process", "survey_data": "inbatch.survey.look"}

__all__ = [
    "METHODS",
    "Encoder",
    "Run",
    "draw_views",
    "embed_run",
    "evaluate_run",
    "export_run",
    "load",
    "load_run",
    "losses",
    "pretrain",
    "rehearse",
    "survey_data",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("inbatch.losses")
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'inbatch' has no attribute {name!r}")
