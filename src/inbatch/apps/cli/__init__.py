"""The command line; torch is imported only when a command runs, so that help is fast."""

from inbatch.apps.cli import annotation, classification, collection, deployment, inspection, papers, system, training
from inbatch.apps.cli.app import app, main

__all__ = [
    "annotation",
    "app",
    "classification",
    "collection",
    "deployment",
    "inspection",
    "main",
    "papers",
    "system",
    "training",
]
