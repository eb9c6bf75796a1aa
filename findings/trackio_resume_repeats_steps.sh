#!/usr/bin/env bash
# A trackio run that is resumed from a checkpoint has two values for each step that was trained again.
#
# Expected: a run was interrupted after step 15, its last checkpoint is of step 10, and training goes on from there with
# resume="allow" and explicit steps. Steps 10 to 15 then have one value each, or a warning says that they have two.
# Seen (trackio 0.43.0): steps 0 to 15 and then 10 to 19 give 26 values for 20 steps, without a warning. `trackio get
# metric` lists them in the order of logging, so that the step falls from 15 back to 10; `trackio get snapshot
# --step 12` returns both values; `num_logs` of `trackio get run` is 26.
#
# Why it matters: a curve drawn through these rows goes back at the interruption, and a mean or a minimum over them
# counts values of weights that were thrown away. A reader has to keep the last value of each step.
#
# Exits with 0 if the behaviour is as described, with 1 if it has changed. Installs about 200 MB in a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check trackio==0.43.0
cd "$folder"
unset TRACKIO_SPACE_ID TRACKIO_SERVER_URL
export HOME="$folder" TRACKIO_DIR="$folder/runs"
cat > train.py <<'PYTHON'
import sys

import trackio

first, end = int(sys.argv[1]), int(sys.argv[2])
trackio.init(project="digits", name="run", resume="allow")
for step in range(first, end):
    trackio.log({"loss": 1 / (1 + step) + (0.5 if first == 0 else 0)}, step=step)
trackio.finish()
PYTHON
"$folder/venv/bin/python" train.py 0 16 > first.txt 2>&1
"$folder/venv/bin/python" train.py 10 20 > second.txt 2>&1
grep "Resumed existing run" second.txt
of=(--project digits --run run --json)
"$folder/venv/bin/trackio" get metric "${of[@]}" --metric loss > metric.json
"$folder/venv/bin/trackio" get snapshot "${of[@]}" --step 12 > snapshot.json
"$folder/venv/bin/trackio" get run "${of[@]}" > run.json
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys
from pathlib import Path

steps = [value["step"] for value in json.loads(Path("metric.json").read_text())["values"]]
twelve = [value["value"] for value in json.loads(Path("snapshot.json").read_text())["metrics"]["loss"]]
rows = json.loads(Path("run.json").read_text())["num_logs"]
warned = "warn" in Path("second.txt").read_text().lower()
print(f"{len(set(steps))} steps, {len(steps)} values, num_logs {rows}, warned: {warned}")
print("steps:", *steps)
print("step 12:", *twelve)
sys.exit(steps != [*range(16), *range(10, 20)] or len(twelve) != 2 or rows != 26 or warned)
PYTHON
