"""Options by which the user names his own code, MODULE:NAME; it is imported because it is typed here."""

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer import Option

from inbatch.apps.cli.app import report_errors
from inbatch.runtime import own_parts


def typed(part: str, text: str | None, option: str | None = None) -> Any:
    """Return what is typed for a part: a name of ours, or the user's own part, imported."""
    return own_parts.imported(part, text, option) if text is not None and own_parts.is_own(text) else text


def _part_callback(part: str) -> Callable[[typer.Context, str | None], str | None]:
    """Return the callback of an option that lets a command use the user's own part of a run."""

    def use(context: typer.Context, text: str | None) -> str | None:
        if text is not None:
            with report_errors(False):
                own = own_parts.imported(part, text)
            context.with_resource(own_parts.using({part: own}))
        return text

    return use


# The error that needs another one than --encoder says what to type; hidden options keep the help short.
_HELP = "Your own encoder, of a run that learned with it; imported from the current folder or a package."
OwnEncoder = Annotated[
    str | None,
    Option("--encoder", metavar="MODULE:NAME", callback=_part_callback("encoder"), help=_HELP),
]
OwnMethod = Annotated[
    str | None, Option("--method", metavar="MODULE:NAME", callback=_part_callback("method"), hidden=True)
]
OwnViews = Annotated[
    str | None, Option("--views", metavar="MODULE:NAME", callback=_part_callback("views"), hidden=True)
]
OwnOptimizer = Annotated[
    str | None,
    Option("--optimizer", metavar="MODULE:NAME", callback=_part_callback("optimizer"), hidden=True),
]
