"""The command line; torch is imported only when a command runs, so that help is fast."""

from inbatch.apps.cli import classification, inspection, papers, system, training
from inbatch.apps.cli.app import app, main

__all__ = ["app", "classification", "inspection", "main", "papers", "system", "training"]
