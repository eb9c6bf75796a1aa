"""Every table and figure of the papers, and the survey's claims, as recipes with the papers' figures."""

from inbatch.apps.papers.spec import Table
from inbatch.apps.papers.tables import (
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
    study_ba2m,
    study_batch_size,
    study_clusters,
    study_methods,
    study_multicrop,
    study_nnclr,
    study_supcon,
    study_transfer,
    study_variance,
)

TABLES: dict[str, Table] = {
    module.TABLE.name: module.TABLE
    for module in (
        ba_ssl_1, ba_ssl_2, ba_ssl_3, ba_ssl_4, ba_ssl_figure_1,
        curation_1, curation_2, curation_figure_3, curation_figure_4, curation_figure_5,
        study_batch_size, study_variance, study_supcon, study_multicrop, study_nnclr, study_clusters, study_ba2m,
        study_transfer, study_methods,
    )
}  # fmt: skip
"""Registry of tables and figures by name."""
