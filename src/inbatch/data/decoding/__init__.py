"""One file per image format."""
