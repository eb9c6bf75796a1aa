"""The command line; torch is imported only when a command runs, so that help is fast."""

from inbatch.apps.cli import (
    adaptation,
    annotation,
    checking,
    choosing,
    classification,
    collection,
    comparison,
    deployment,
    evaluation,
    inspection,
    papers,
    system,
    tidy,
    training,
)
from inbatch.apps.cli.app import app, main

__all__ = [
    "adaptation",
    "annotation",
    "app",
    "checking",
    "choosing",
    "classification",
    "collection",
    "comparison",
    "deployment",
    "evaluation",
    "inspection",
    "main",
    "papers",
    "system",
    "tidy",
    "training",
]
