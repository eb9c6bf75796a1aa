"""Tables and figures of papers as recipes, with the papers' figures next to our results."""

from inbatch.apps.papers.tables import TABLES

__all__ = ["TABLES"]
