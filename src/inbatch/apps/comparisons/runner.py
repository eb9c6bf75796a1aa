"""Run the cells of a comparison as those of a paper's table, with the measures that need no labels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from inbatch.apps.comparisons.metrics import UNLABELLED
from inbatch.apps.papers.runner import Runner
from inbatch.apps.papers.spec import Cell
from inbatch.errors import InbatchError
from inbatch.runtime.files import write_json

PROTOCOLS = "knn,linear,clustering"


class ComparisonRunner(Runner):
    """Runner of a user's comparison."""

    def _completed(self, cell: Cell, result: dict[str, Any], log: Path) -> dict[str, Any]:
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
        return self._call(replace(cell, row="plan"), words, log)
