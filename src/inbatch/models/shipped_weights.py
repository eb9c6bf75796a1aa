"""Small weights that are part of the package, by name: `inbatch/cifar10-fast`."""

from pathlib import Path

from inbatch.errors import ConfigError, listed

PREFIX = "inbatch"


def weights_folder() -> Path:
    """Return the directory of the weights: in the package, or `weights` of a checkout."""
    here = Path(__file__).parents
    packaged = here[0] / "shipped"
    return packaged if packaged.is_dir() else here[3] / "weights"


def weight_names() -> list[str]:
    """Return the names of the weights, without the prefix."""
    return sorted(path.parent.name for path in weights_folder().glob("*/config.json"))


def is_shipped(path: Path) -> bool:
    """Return whether a path is the name of weights of the package; a file or folder of this path is meant first."""
    return len(path.parts) == 2 and path.parts[0] == PREFIX and not path.exists()


def with_shipped(path: Path) -> Path:
    """Return the folder of the weights if a path is their name, other paths unchanged.

    Raises:
        ConfigError: If the package has no weights of this name.
    """
    if not is_shipped(path):
        return path
    if path.name not in weight_names():
        known = listed([f"{PREFIX}/{name}" for name in weight_names()], 8)
        raise ConfigError(f"there is no folder {path}, and no weights of this name in the package: it has {known}")
    return weights_folder() / path.name
