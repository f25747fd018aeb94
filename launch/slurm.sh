#!/usr/bin/env bash
# A job on the GPUs of a SLURM cluster.
set -euo pipefail
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

usage() {
  cat <<'END'
Submits a job of one process a GPU, which JAX then joins by itself:

  launch/slurm.sh --name=memory --nodes=8 --gpus-per-node=8 --time=24:00:00 --pass=--partition=h100 \
      --workdir=/shared/llama2 --gin-file=gin_configs/recipes/paper_llama2_7b_wikipedia.gin

Before the time limit the job saves a checkpoint and puts itself into the queue again, until the stage
is done; so it does after a lost node. scancel ends it. The workdir and this checkout with its .venv
must be where all nodes see them.

The machines:
  --name NAME         of the job and its log, NAME-JOB.log (mlp-memory)
  --nodes N           (1)
  --gpus-per-node N   (8)
  --time LIMIT        of one start (24:00:00)
  --grace SECONDS     before that limit in which to save a checkpoint (120)
  --python PYTHON     (.venv/bin/python of this checkout)
  --pass FLAG         one more flag for sbatch, as --pass=--account=ME; may be given again

END
  common_flags
}

name=mlp-memory nodes=1 gpus_per_node=8 time=24:00:00 grace=120 python=$root/.venv/bin/python
parse "name nodes gpus_per_node time grace python" "" "$@"
need workdir
need_positive nodes gpus_per_node grace
need_recipes
need_program sbatch "start this on a login node of the cluster"
need_program "$python" "make it with make .venv/.ready, or give --python"

# One process a GPU: of the GPUs of its node, JAX takes the one with the number of the process there.
set_words "$workdir"
run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus_per_node" \
  --gpus-per-node="$gpus_per_node" --time="$time" --requeue --signal="B:USR1@$grace" \
  --output=%x-%j.log --open-mode=append "${pass[@]}" \
  "$root/launch/slurm_job.sh" "$python" -m mlp_memory "${words[@]}"
