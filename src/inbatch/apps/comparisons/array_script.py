"""The runs of a comparison as an array job for SLURM, from the batch script of `inbatch slurm`."""

import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

_BEGIN = "nodes=${SLURM_JOB_NUM_NODES:-1}"
_OUT = "out=runs/$SLURM_JOB_NAME-$SLURM_JOB_ID # the same after a requeue\n"
_RUN = '-m inbatch pretrain "$@" --out'

_HEAD = """#!/bin/bash
# The runs of a comparison as an array of SLURM jobs, one task for each run.
#
#   bash {name}           submits the array, and after it a job that writes the table
#   bash {name} 0         runs task 0 on this machine, without SLURM
#   bash {name} render    writes the table of the finished runs
#
# Each task resumes its run. Set the lines below to what the cluster has; the folder must be shared by all nodes.
#SBATCH --job-name=inbatch-compare
#SBATCH --array=0-{last}
"""
_TASKS = """
cd {here} || exit 1
runs=(
{runs}
)
code=(
{code}
)
table=({table})
command -v inbatch > /dev/null || table=({python} -m "${{table[@]}}")

case ${{SLURM_ARRAY_TASK_ID:-${{1:-submit}}}} in
submit)
  job=$(sbatch --parsable "$0") || exit 1
  exec sbatch --dependency="afterany:${{job%%;*}}" --job-name=inbatch-table --wrap "$(printf '%q ' "${{table[@]}}")"
  ;;
render) exec "${{table[@]}}" ;;
esac
task=${{SLURM_ARRAY_TASK_ID:-$1}}
run=${{runs[task]:?no run has this number}}
out=$run
eval "set -- ${{code[task]}}"
set -- --config "$run.json"{options} "$@"
if [ -z "$SLURM_ARRAY_TASK_ID" ]; then
  exec {python} -m inbatch pretrain "$@" --out "$out" --resume auto
fi

"""


def array_script(
    file: Path, tasks: Sequence[tuple[Path, list[str]]], table: Sequence[str], *, python: str, download: bool
) -> str:
    """Return the script: the lines for SLURM and the handling of its time limit are those of `inbatch slurm`.

    Args:
        file: Where the script is written.
        tasks: Run folders, each with its recipe in FOLDER.json, and the options that name code of the user.
        table: Command that writes the table.
        python: Interpreter for tasks without SLURM.
        download: Tasks may download a torchvision data set.
    """
    batch = files("inbatch.apps.cli").joinpath("job.sbatch").read_text("utf-8")
    lines = [line for line in batch.splitlines() if line.startswith("#SBATCH") and "--job-name" not in line]
    assert _BEGIN in batch and _OUT in batch and _RUN in batch
    rest = batch[batch.index(_BEGIN) :].replace(_OUT, "")
    head = _HEAD.format(name=file.name, last=len(tasks) - 1) + "\n".join(lines) + "\n"
    runs = _TASKS.format(
        here=shlex.quote(str(Path.cwd())),
        runs="\n".join(f"  {shlex.quote(str(folder))}" for folder, _ in tasks),
        code="\n".join(f"  {shlex.quote(shlex.join(words))}" for _, words in tasks),
        table=shlex.join(table),
        options=" --download" if download else "",
        python=shlex.quote(python),
    )
    return head + runs + rest
