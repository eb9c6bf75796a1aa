"""Shared fixtures: shapes in signatures are checked, torch uses one thread, the network is blocked."""

import os
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# Before any other import: no connection may leave this machine, neither from this process nor from its children.
OFFLINE = str(Path(__file__).parent / "offline")
if OFFLINE not in sys.path:
    sys.path.insert(0, OFFLINE)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (OFFLINE, os.environ.get("PYTHONPATH"))))
    sys.modules.pop("sitecustomize", None)  # of another package
    import sitecustomize  # noqa: F401

CHECKED = ("rng", "nn.functional", "nn.memory_bank", "nn.clustering", "methods", "data.views", "evaluation", "context")
# Before inbatch is imported: signatures are checked in tests only.
install_import_hook(
    [f"inbatch.{room}" for room in CHECKED],
    "beartype.beartype",
)

torch.set_num_threads(1)  # the tensors are tiny, and two ranks share two cores

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Return the directory of the conformance vectors."""
    return Path(os.environ.get("INBATCH_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def cifar() -> Path:
    """Return the directory of real photographs next to the checkout; skip if it does not exist."""
    folder = SHARED / "data" / "cifar10-jpeg"
    if not folder.is_dir():
        pytest.skip("needs shared/data/cifar10-jpeg beside the checkout")
    return folder


@pytest.fixture(autouse=True)
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the user's cache in this process and in the processes that a test starts."""
    monkeypatch.setenv("INBATCH_CACHE", "off")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
