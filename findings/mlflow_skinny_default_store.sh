#!/usr/bin/env bash
# mlflow-skinny cannot record a metric in its default store, and no error names the packages that are missing.
#
# Expected: in a fresh environment, mlflow.log_metric writes to the default store, or an error names the packages that
# this store needs.
# Seen (mlflow-skinny 3.17.2): the default store is sqlite:///.../mlflow.db, and recording one metric ends with
# UnsupportedModelRegistryStoreURIException: "Model registry functionality is unavailable; got unsupported URI
# 'sqlite:///.../mlflow.db' ... Supported URI schemes are: ['', 'file', 'databricks', 'databricks-uc', 'uc', 'http',
# 'https']". No model was registered. A folder, which the list offers, is refused too: "The filesystem tracking backend
# ... is in maintenance mode ... Please migrate to a database backend (e.g., 'sqlite:///mlflow.db')", unless
# MLFLOW_ALLOW_FILE_STORE=true is set. What is missing is sqlalchemy and alembic, which the description of the package
# names (with sqlparse, which it installs itself) and neither error does. With both, the same program works.
#
# Why it matters: the default store cannot work with what the package installs, and who records a first metric reads
# about a model registry and is then sent in a circle: to a folder, and from the folder back to sqlite.
#
# Exits with 0 if the behaviour is as described, with 1 if it has changed. Installs about 180 MB in a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install=("$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${install[@]}" mlflow-skinny==3.17.2
cd "$folder"
unset MLFLOW_TRACKING_URI MLFLOW_REGISTRY_URI MLFLOW_ALLOW_FILE_STORE
export MLFLOW_DISABLE_TELEMETRY=true
cat > record.py <<'PYTHON'
import sys

import mlflow

if len(sys.argv) > 1:
    mlflow.set_tracking_uri(sys.argv[1])
try:
    mlflow.log_metric("loss", 0.5, step=1)
    print("recorded", mlflow.get_run(mlflow.active_run().info.run_id).data.metrics)
except Exception as error:
    print(f"{type(error).__name__}: {str(error).strip()}")
PYTHON
record() {
    HOME="$folder" "$folder/venv/bin/python" record.py "$@" 2> errors.txt | tee seen.txt
}
echo "mlflow-skinny 3.17.2 alone, default store:"
record
grep -q "^UnsupportedModelRegistryStoreURIException: .*got unsupported URI 'sqlite:///" seen.txt
if grep -qiE "sqlalchemy|alembic" seen.txt errors.txt; then exit 1; fi
echo "a folder:"
record ./runs
grep -q "maintenance mode.*sqlite:///mlflow.db" seen.txt
if grep -qiE "sqlalchemy|alembic" seen.txt errors.txt; then exit 1; fi
"${install[@]}" sqlalchemy==2.1.9 alembic==1.20.1
echo "with sqlalchemy 2.1.9 and alembic 1.20.1, default store:"
record
grep -qx "recorded {'loss': 0.5}" seen.txt
