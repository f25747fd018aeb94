#!/usr/bin/env bash
# What SLURM runs on the first node of a job that launch/slurm.sh submitted: the command given to it,
# once a GPU; once more after the time limit. SLURM copies this file, so it sources none.
set -euo pipefail

if (($# == 0)) || [[ $1 == --help ]]; then
  echo "For launch/slurm.sh to submit: sbatch FLAGS launch/slurm_job.sh COMMAND..."
  (($#)) && exit 0 || exit 2
fi

# SLURM's warning of the time limit comes to this shell alone, so that scancel is told apart from it.
# The processes save a checkpoint on SIGTERM; srun would kill them on its own.
time_is_up=false
trap 'time_is_up=true; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=1 --gpu-bind=none "$@" &
job=$!
status=0
wait "$job" || status=$?
if $time_is_up; then # it was the warning that ended that wait
  status=0
  wait "$job" || status=$?
fi

if $time_is_up && ((status)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
