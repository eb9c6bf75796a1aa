"""The page of results says what the files say."""

import importlib.util
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"


def test_the_page_is_what_the_files_make() -> None:
    spec = importlib.util.spec_from_file_location("render", RESULTS / "render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    assert (RESULTS / "README.md").read_text() == render.page(), "python results/render.py writes it anew"
