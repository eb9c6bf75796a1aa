"""Run command lines in this process."""

import json
import shlex
from typing import Any

from typer.testing import CliRunner, Result

from inbatch.apps.cli import app


def run(line: str) -> Result:
    """Run one command line in this process; exceptions propagate."""
    return CliRunner().invoke(app, shlex.split(line), catch_exceptions=False, env={"COLUMNS": "200", "NO_COLOR": "1"})


def one_object(text: str) -> dict[str, Any]:
    content = json.loads(text)
    assert isinstance(content, dict)
    return content
