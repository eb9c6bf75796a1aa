"""The command line. Torch and everything that needs it is imported when a command runs: help is instant."""

from inbatch.apps.cli import inspection, papers, system, training
from inbatch.apps.cli.app import app, main

__all__ = ["app", "inspection", "main", "papers", "system", "training"]
