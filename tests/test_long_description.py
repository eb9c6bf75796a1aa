"""The README as the long description of the package."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    interface = ModuleType("hatchling.metadata.plugin.interface")
    interface.MetadataHookInterface = object  # type: ignore[attr-defined]
    for name in ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


@pytest.mark.parametrize("repository", ["https://example.org/inbatch", ""])
def test_links_are_absolute_or_text(hook: ModuleType, repository: str) -> None:
    readme = (ROOT / "README.md").read_text()
    text = hook.long_description(readme, repository)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert all(target.startswith(("https://", "#")) for target in targets) and len(re.findall(r"\]\(", readme)) > 50
    if repository:
        assert "![Loss" in text and f"({repository}/raw/HEAD/docs/quickstart-curves.png)" in text
        assert "[data](docs/data.md)" not in text and f"({repository}/blob/HEAD/docs/budget.md)" in text
    assert text.index("pip install inbatch") < text.index("pip install .")
