"""The command line; torch is imported only when a command runs, so that help is fast."""

from inbatch.apps.cli import deployment, inspection, papers, system, training
from inbatch.apps.cli.app import app, main

__all__ = ["app", "deployment", "inspection", "main", "papers", "system", "training"]
