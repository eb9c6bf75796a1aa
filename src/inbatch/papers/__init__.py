"""Every table and figure of the papers, and the survey's claims, as recipes with the papers' figures beside ours."""

from inbatch.papers import (
    ba_ssl_1,
    ba_ssl_2,
    ba_ssl_3,
    ba_ssl_4,
    ba_ssl_figure_1,
    curation_1,
    curation_2,
    curation_figure_3,
    curation_figure_4,
    curation_figure_5,
)
from inbatch.papers.table import Table

TABLES: dict[str, Table] = {
    module.TABLE.name: module.TABLE
    for module in (
        ba_ssl_1, ba_ssl_2, ba_ssl_3, ba_ssl_4, ba_ssl_figure_1,
        curation_1, curation_2, curation_figure_3, curation_figure_4, curation_figure_5,
    )
}  # fmt: skip
"""Name -> table or figure: the whole registry."""
