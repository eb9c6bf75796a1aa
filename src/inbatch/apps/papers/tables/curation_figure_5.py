"""Batch curation, Figure 5: k-NN over the epochs with and without the curator; the runs are those of Table 2."""

from dataclasses import replace

from inbatch.apps.papers.tables import curation, curation_2

TABLE = replace(
    curation_2.TABLE,
    name="curation-figure-5",
    title="k-NN while SimCLR learns with the batch curator and without",
    source=f"{curation.SOURCE}, Figure 5 (the paper gives no figures; those of Table 2 are shown)",
    question="Does k-NN rise when curation begins?",
    scales=curation.scales("k-NN"),
    headings=("K-NN",),
    findings={
        "cpu": "On photographs the curve with the curator leaves the other after the second epoch and ends 0.5 "
        "points above it, as the paper's does in the long run (1.34), with three seeds at p 0.06. On the digits the "
        "curves lie within each other's spread from end to end."
    },
    rows=tuple(replace(row, paper={"K-NN": row.paper["K-NN"]} if row.paper else {}) for row in curation_2.TABLE.rows),
    curve="knn",
)
