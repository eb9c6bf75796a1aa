"""Batch curation, Figure 4: k-NN over the epochs for each crop sampling; the runs are those of Table 1."""

from dataclasses import replace

from inbatch.apps.papers.tables import curation, curation_1

TABLE = replace(
    curation_1.TABLE,
    name="curation-figure-4",
    title="k-NN while SimCLR learns from each kind of pairs",
    source=f"{curation.SOURCE}, Figure 4 (the paper gives no figures; those of Table 1 are shown)",
    question="Which pairs make k-NN rise fastest, and are large crops better only at first?",
    scales=curation.scales("k-NN"),
    headings=("K-NN",),
    findings={
        "cpu": "On the digits the curves of big crops rise fastest, as in the paper, and that of adjacent pairs "
        "falls below the untrained encoder. The paper's big crops are caught up with in the long run; thirty epochs "
        "do not show that. On photographs all eight curves end within two points of each other, adjacent pairs "
        "lowest."
    },
    rows=tuple(replace(row, paper={"K-NN": row.paper["K-NN"]} if row.paper else {}) for row in curation_1.TABLE.rows),
    curve="knn",
)
