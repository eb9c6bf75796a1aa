"""Batch curation, Figure 5: k-NN over the epochs with the curator and without. Its runs are Table 2's."""

from dataclasses import replace

from inbatch.papers import curation, curation_2

TABLE = replace(
    curation_2.TABLE,
    name="curation-figure-5",
    title="k-NN while SimCLR learns with the batch curator and without",
    source=f"{curation.SOURCE}, Figure 5 (no figures are given; those of Table 2 stand beside ours)",
    asks="Does k-NN rise when curation begins?",
    scales=curation.scales("k-NN"),
    headings=("K-NN",),
    rows=tuple(replace(row, paper={"K-NN": row.paper["K-NN"]} if row.paper else {}) for row in curation_2.TABLE.rows),
    curve="knn",
)
