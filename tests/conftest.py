"""What every test shares: shapes in signatures are checked, one thread, no network."""

import os
import sys
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# First of all: nothing may reach a network, neither this process nor any that a test starts.
OFFLINE = str(Path(__file__).parent / "offline")
if OFFLINE not in sys.path:
    sys.path.insert(0, OFFLINE)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (OFFLINE, os.environ.get("PYTHONPATH"))))
    sys.modules.pop("sitecustomize", None)  # another's
    import sitecustomize  # noqa: F401

CHECKED = ("rng", "nn.functional", "nn.memory_bank", "nn.clustering", "methods", "data.views", "evaluation", "context")
# Before anything of ours is imported: signatures are checked in tests only.
install_import_hook(
    [f"inbatch.{room}" for room in CHECKED],
    "beartype.beartype",
)

torch.set_num_threads(1)  # tiny tensors; and two ranks on two cores

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of the conformance vectors."""
    return Path(os.environ.get("INBATCH_GOLDEN", Path(__file__).parent / "golden"))


@pytest.fixture(scope="session")
def cifar() -> Path:
    """Real photographs, which stand beside the checkout where there are any."""
    folder = SHARED / "data" / "cifar10-jpeg"
    if not folder.is_dir():
        pytest.skip("needs shared/data/cifar10-jpeg beside the checkout")
    return folder


@pytest.fixture(autouse=True)
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written into the user's cache; processes that a test starts inherit it."""
    monkeypatch.setenv("INBATCH_CACHE", "off")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
