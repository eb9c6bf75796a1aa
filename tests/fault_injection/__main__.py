"""Inject every fault into a run and compare the results with the documented behaviour.

python -m tests.fault_injection [--only 5,7] [--markdown docs/fault-injection.md]: exits with 1 if any result differs.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from fault_injection.faults import INJECTIONS, Injection
from inbatch.apps.console import print_table, say
from inbatch.runtime.text import printable


def one_line(value: dict[str, Any]) -> str:
    """Format an expectation or a result as one line."""
    return "; ".join(
        f"{key} {' / '.join(f'“{word}”' for word in item) if isinstance(item, tuple) else item}"
        for key, item in value.items()
    )


def differs(expected: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
    """Return the results that have an expectation; of the output, only the expected words that it contains."""
    results: dict[str, Any] = {}
    for key, item in expected.items():
        if key == "says":
            output = " ".join(str(seen["says"]).split())
            results[key] = tuple(word for word in item if word in output) or f"only “…{output[-300:]}”"
        else:
            results[key] = seen.get(key)
    return results


def done(injection: Injection) -> tuple[bool, str, float]:
    """Return whether the fault was handled as expected, the result, and the seconds it took."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="inbatch-injection-", ignore_cleanup_errors=True) as folder:
        try:
            seen = differs(injection.expected, injection.act(Path(folder)))
            fine, text = seen == injection.expected, one_line(seen)
        except Exception as error:
            fine, text = False, f"{type(error).__name__}: {error}"
        text = text.replace(folder, "DIR")
    return fine, " ".join(printable(text).split()), time.monotonic() - began


def markdown(rows: list[tuple[str, ...]], headings: tuple[str, ...]) -> str:
    """Return the table of the documentation, with every markup character escaped."""
    cells = [headings, ("---",) * len(headings), *(tuple(map(escaped, row)) for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) + "\n"


def escaped(text: str) -> str:
    for sign in "\\`*_[]|":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fault_injection", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", metavar="N,N", help="faults of these numbers")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    args = parser.parse_args()
    wanted = {int(number) for number in args.only.split(",") if number}
    headings, rows, wrong = ("", "fault", "injected", "expected", "seen", "s"), [], 0
    for injection in INJECTIONS:
        if wanted and injection.number not in wanted:
            continue
        fine, seen, seconds = done(injection)
        wrong += not fine
        say(f"{injection.number:2} {'as expected' if fine else 'DIFFERS'}: {injection.fault} ({seconds:.0f} s)")
        seen = "as expected" if fine and seen == one_line(injection.expected) else ("" if fine else "DIFFERS: ") + seen
        rows.append(
            (
                str(injection.number),
                injection.fault,
                injection.injected,
                one_line(injection.expected),
                seen,
                f"{seconds:.0f}",
            )
        )
    print_table(headings, rows)
    say("", f"{len(rows)} injections, {wrong} other than expected")
    if args.markdown:
        how = "`python -m tests.fault_injection --markdown docs/fault-injection.md`"
        intro = f"# Results of the fault injection suite\n\nWritten by {how}; see [faults](faults.md).\n\n"
        args.markdown.write_text(intro + markdown(rows, headings), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
