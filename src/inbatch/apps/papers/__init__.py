"""Tables and figures of papers as recipes, with the papers' figures beside ours."""

from inbatch.apps.papers.tables import TABLES

__all__ = ["TABLES"]
