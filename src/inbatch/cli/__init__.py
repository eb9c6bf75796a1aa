"""The command line. Torch and everything that needs it is imported when a command runs: help is instant."""

from inbatch.cli import run, look, table, machine  # isort: skip - the order of commands in the help
from inbatch.cli.base import app, main

__all__ = ["app", "look", "machine", "main", "run", "table"]
