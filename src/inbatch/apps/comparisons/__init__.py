"""A user's own comparison: variants of a run on the same images with the same seeds, tested and written as a table."""
