#!/usr/bin/env bash
# faiss.contrib.big_batch_search prints its progress when it is asked to be silent.
#
# Expected: big_batch_search(..., verbose=0), the default, prints nothing, and higher levels print more.
# Seen (faiss-cpu 1.15.1, numpy 2.4.6): with verbose=0, one progress message per inverted list goes to standard output,
# here 32 for an index of 32 lists; with verbose=1 there is none, only the summary of each phase. The report of a list
# is left out if `verbose == 1`, so that the default is the only level below 2 that prints it. All three forms of the
# search (threaded=0, 1 and 2) behave alike. The neighbours found are those of index.search in each case.
#
# Why it matters: a message has about 130 characters and an index of a million vectors has thousands of lists, so a
# program that writes its result to standard output has it mixed with hundreds of kilobytes. verbose=1 is quieter.
#
# Exits with 0 if the behaviour is as described, with 1 if it has changed. Installs about 170 MB in a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check faiss-cpu==1.15.1 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib
import io
import sys

import faiss
import numpy as np
from faiss.contrib.big_batch_search import big_batch_search

print("faiss", faiss.__version__, "numpy", np.__version__)
faiss.omp_set_num_threads(1)
random = np.random.default_rng(0)
stored = random.random((5000, 16), dtype=np.float32)
queries = random.random((100, 16), dtype=np.float32)
index = faiss.index_factory(16, "IVF32,Flat")
index.train(stored)
index.add(stored)
index.nprobe = 4
_, expected = index.search(queries, 5)

changed = False
for threaded in (0, 1, 2):
    for level, messages in (({}, 32), ({"verbose": 0}, 32), ({"verbose": 1}, 0), ({"verbose": 2}, 32)):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            _, found = big_batch_search(index, queries, 5, threaded=threaded, **level)
        text = printed.getvalue()
        seen = text.count(" list ")
        print(f"threaded={threaded} {level or 'default'}: {seen} messages of lists, {len(text)} characters")
        changed |= seen != messages or not np.array_equal(found, expected)
sys.exit(changed)
PYTHON
