"""Command for parts that users write: check-method."""

from typing import Annotated, Any

from typer import Argument, Option

from inbatch.apps.cli.app import Json, app, assignments, emit_result, report_errors
from inbatch.apps.console import say
from inbatch.errors import ConfigError, TrainingError
from inbatch.runtime import own_parts


@app.command(
    name="check-method",
    epilog="Examples:\n\n  inbatch check-method my_package.my_module:MyMethod\n\n"
    "  inbatch check-method my_methods:MyMethod --set queue_size=64 --batch-size 32\n\n"
    "  inbatch check-method moco --set queue_size=64 --json",
)
def check_method(
    method: Annotated[
        str, Argument(metavar="MODULE:CLASS|NAME", help="The class, which is imported and run, or a method's name.")
    ],
    options: Annotated[
        list[str] | None, Option("--set", metavar="KEY=VALUE", help="Option of the constructor; repeatable.")
    ] = None,
    batch_size: Annotated[int, Option("--batch-size", min=4, help="Samples of the batch, an even number.")] = 16,
    num_views: Annotated[
        int | None, Option("--num-views", min=1, help="Views of a sample; default: as few as allowed, at least 2.")
    ] = None,
    any_order: Annotated[
        bool, Option("--any-order/--fixed-order", help="Whether the order of samples must not matter.")
    ] = True,
    processes: Annotated[bool, Option(help="Also run two ranks in processes of their own.")] = True,
    as_json: Json = False,
) -> None:
    """Test whether a method keeps the rules that make ranks, context groups and resumed runs exact.

    Exits with 4 if a test fails, after printing what is broken and how to fix it.
    """
    with report_errors(as_json):
        from inbatch.testing import check_method as check

        values = {key.removeprefix("method."): value for key, value in assignments(options).items()}
        if reserved := sorted(values.keys() & {"batch_size", "num_views", "any_order", "processes", "raise_errors"}):
            raise ConfigError(
                f"--set {reserved[0]} is an option of the check, not of a method: see inbatch check-method --help"
            )
        failed: list[str] = []

        def compute() -> dict[str, Any]:
            report = check(
                _import_method(method), batch_size=batch_size, num_views=num_views, any_order=any_order,
                processes=processes, raise_errors=False, **values,
            )  # fmt: skip
            failed.extend(finding.kind for finding in report.failures)
            return report.json()

        def end(result: dict[str, Any]) -> None:
            if failed:
                raise TrainingError(f"{result['method']} fails {len(failed)} of {len(result['findings'])} tests")

        emit_result(compute, as_json, _show, end)


def _show(result: dict[str, Any]) -> None:
    marks = {True: "ok    ", False: "FAILED", None: "-     "}
    say(*(f"{marks[one['passed']]}  {one['kind']:<10}  {one['sentence']}" for one in result["findings"]))


def _import_method(name: str) -> Any:
    """Return the class that was typed: MODULE:CLASS, one of `METHODS`, or of an installed package's entry point."""
    from inbatch.methods import METHODS

    if own_parts.is_own(name):
        return own_parts.imported("method", name, "METHOD").maker
    if name not in METHODS and (own := own_parts.find("method", name)) is not None:
        return own.maker
    if name not in METHODS:
        raise ConfigError(f"{name!r} is not a method: give MODULE:CLASS, or one of {', '.join(METHODS)}")
    return METHODS[name]
