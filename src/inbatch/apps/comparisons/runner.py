"""Run the cells of a comparison as those of a paper's table, with the measures that need no labels."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inbatch.apps.comparisons.metrics import UNLABELLED
from inbatch.apps.papers.runner import Runner
from inbatch.apps.papers.spec import Cell
from inbatch.errors import InbatchError
from inbatch.runtime.files import write_json
from inbatch.runtime.own_parts import OwnPart

PROTOCOLS = "knn,linear,clustering"


@dataclass
class ComparisonRunner(Runner):
    """Runner of a user's comparison.

    Attributes:
        code: Name of a variant -> its parts that are code of the user, by part.
    """

    code: Mapping[str, Mapping[str, OwnPart]] = field(default_factory=dict)

    def code_words(self, cell: Cell, command: str = "pretrain") -> list[str]:
        """Return the options by which a command on a cell's run imports the code of the user."""
        parts = self.code.get(cell.row, {}).items()
        used = [(part, own) for part, own in parts if command == "pretrain" or part != "optimizer"]
        return [word for part, own in used for word in (f"--{part}", own.name)]

    def _call(self, cell: Cell, words: list[str], log: Path) -> dict[str, Any]:
        return super()._call(cell, [*words, *self.code_words(cell, words[0])], log)

    def _complete_result(self, cell: Cell, result: dict[str, Any], log: Path) -> dict[str, Any]:
        """Return the result with the measures without labels and, with a budget, an evaluation on all images.

        A run with a budget evaluates on as many images as its time allows, which would differ between variants.
        """
        folder = self.work / cell.stem
        evaluation, measures = result["evaluation"], result["unlabelled"]
        if cell.settings.get("budget") is not None:
            words = ["evaluate", str(folder), "--out", str(folder / "evaluation.json")]
            words += [] if evaluation is None else ["--protocol", PROTOCOLS]
            again = self._call(cell, words, log)
            if "exit_code" in again:
                raise InbatchError(f"the run {cell.stem} cannot be evaluated: {again['error']}")
            evaluation, measures = (None, again["unlabelled"]) if evaluation is None else (again, measures)
        figures = {name: measure["trained"] for name, measure in measures.items()}
        return result | {"evaluation": (evaluation or {}) | {UNLABELLED: figures}}

    def dry_run(self, cell: Cell, settings: dict[str, Any], place: str) -> dict[str, Any]:
        """Return the result of `inbatch pretrain --dry-run` for settings, in a process with the threads of a run.

        Args:
            cell: The cell whose name the files get.
            settings: Requested settings, nested or dotted, without data.
            place: Location of the images.
        """
        file = self.work / "plans" / f"{cell.stem}.json"
        write_json(file, settings | {"data": place})
        words = ["pretrain", "--config", str(file), "--dry-run", *(["--download"] if self.download else [])]
        log = self.work / "plans" / f"{cell.stem}.log"
        return self._call(cell, words, log)
