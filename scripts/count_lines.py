"""Count the lines of every method's file and write them into add-a-method.md."""

import re
from pathlib import Path

from inbatch.methods import METHODS

HERE = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    folder, page = HERE.parent / "src" / "inbatch" / "methods", HERE / "add-a-method.md"
    count = {name: len((folder / f"{name}.py").read_text().splitlines()) for name in METHODS}
    rows = [f"| `{name}.py` | {lines} |" for name, lines in sorted(count.items(), key=lambda item: item[1])]
    table = "\n".join(["| file | lines |", "| --- | --- |", *rows, ""])
    page.write_text(re.sub(r"\| file \| lines \|\n(\|.*\n)*", table, page.read_text()))


if __name__ == "__main__":
    main()
