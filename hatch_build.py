"""Make the long description and the links of the package's metadata."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s]+)\)")


def long_description(readme: str, repository: str) -> str:
    """Return the README with absolute links; without an address of the repository, links become their text."""

    def replace(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        kind = "raw" if image else "blob"
        return f"{image}[{text}]({repository}/{kind}/HEAD/{target})" if repository else text

    return LINK.sub(replace, readme)


class LinkedMetadata(MetadataHookInterface):
    """Fields of the metadata that depend on the address of the repository."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the long description and the links."""
        repository = str(self.config.get("repository", "")).rstrip("/")
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": long_description(readme, repository)}
        pages = {
            "Repository": "", "Issues": "/issues", "Changelog": "/blob/HEAD/CHANGELOG.md",
            "Documentation": "/blob/HEAD/docs/index.md",
        }  # fmt: skip
        metadata["urls"] = {name: repository + page for name, page in pages.items()} if repository else {}
