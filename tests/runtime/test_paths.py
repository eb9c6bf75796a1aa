"""Paths that users give are checked and expanded by one function; blank environment variables count as not set."""

from pathlib import Path

import pytest

import inbatch
from inbatch.data import cache, open_data
from inbatch.errors import ConfigError, DataError
from inbatch.evaluation import write_embeddings
from inbatch.models import create_encoder, load_encoder, save_encoder
from inbatch.runtime.paths import expanded, path_of, variable
from inbatch.runtime.resources import launched
from inbatch.training.monitors.reference import read_reference
from inbatch.training.plan import plan_without_budget
from inbatch.training.run_encoder import load_run_encoder
from inbatch.training.settings_file import read_file


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home directory, with another folder as the current one."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_invalid_paths_are_named(home: Path) -> None:
    for value, problem in (
        (None, "out must be a path (str or pathlib.Path), not NoneType"), (3, "not int"), ([], "not list"),
        ("", "out is blank"), (" ", "out is blank"), ("a\0b", "null character"), ("~nobody-here/x", "home directory"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            path_of(value, "out")
        assert problem in str(caught.value), value
    for call in (
        inbatch.load,
        inbatch.load_run,
        inbatch.evaluate_run,
        load_encoder,
        read_reference,
        inbatch.inspect_run,
    ):
        for value in (None, 5, ""):
            with pytest.raises(ConfigError):
                call(value)


def test_a_tilde_is_the_home_directory_everywhere(home: Path) -> None:
    assert path_of("~/x") == home / "x" and expanded(Path("~/x")) == home / "x" and expanded("~/x") == str(home / "x")
    assert expanded("a~b") == "a~b" and expanded(5) == 5 and path_of(b"x") == Path("x")
    Path("~kept").mkdir()
    assert path_of("~kept") == Path("~kept"), "a file of this name is meant first"
    save_encoder(create_encoder("tiny", size=16), "~/encoder")
    assert (home / "encoder" / "config.json").is_file() and load_run_encoder("~/encoder").encoder.size == 16
    (home / "settings.yaml").write_text("epochs: 3")
    assert read_file("~/settings.yaml") == {"epochs": 3}
    inbatch.data.write_folder(open_data("digits-canvas", subset=4), "~/images")
    assert len(open_data("~/images")) == 4
    with pytest.raises(DataError, match="was not written"):
        write_embeddings("~/features.npz", iter(()))
    assert plan_without_budget("~/images", {"epochs": 1}).recipe.data == str(home / "images")
    assert plan_without_budget(None, {"epochs": 1, "data": "~/images"}).recipe.data == str(home / "images")
    assert {path.name for path in Path().iterdir()} == {"~kept"}, "nothing is written to a folder named ~"


def test_blank_variables_count_as_not_set(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for blank in ("", " ", "\t"):
        for name in ("INBATCH_CACHE", "INBATCH_CACHE_GB", "WORLD_SIZE"):
            monkeypatch.setenv(name, blank)
        assert variable("INBATCH_CACHE") == ""
        root = cache.where()
        assert root is not None and root.is_relative_to(home) and root.name == "inbatch", blank
        assert cache.limit() == 10_000_000_000 and launched("WORLD_SIZE") == 1
    monkeypatch.setenv("INBATCH_CACHE", "~/decoded ")
    assert cache.where() == home / "decoded"
    monkeypatch.setenv("INBATCH_CACHE", " OFF")
    assert cache.where() is None
