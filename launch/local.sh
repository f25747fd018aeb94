#!/usr/bin/env bash
# A job on this machine: one process, or several that share its devices.
set -euo pipefail
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

usage() {
  cat <<'END'
Runs a stage here. One process uses all GPUs, which is the usual way; several split them, as on a
cluster, or try that on a laptop:

  launch/local.sh --workdir=runs/demo --gin-file=gin_configs/recipes/demo.gin --restarts=3
  launch/local.sh --processes=2 --gpus=8 --workdir=runs/mine --gin-file=gin_configs/recipes/demo.gin
  launch/local.sh --processes=2 --cpu-devices=4 --workdir=runs/two --stage=pretrain

When one process dies the others are ended too, and all start again where the last checkpoint is. An
error that the user can mend (exit code 2) and Ctrl-C or SIGTERM, after which a checkpoint is saved,
are not followed by another start.

The processes:
  --processes N       (1)
  --gpus N            GPUs to split evenly between the processes (all for one process)
  --cpu-devices N     devices of each process, all on the CPU, to try a mesh
  --restarts N        after a failure (0)
  --grace SECONDS     to save a checkpoint in before a process is killed (120)
  --port PORT         for the processes to meet at (29400)
  --python PYTHON     (.venv/bin/python of this checkout)

END
  common_flags
}

processes=1 gpus='' cpu_devices='' restarts=0 grace=120 port=29400 python=$root/.venv/bin/python
parse "processes gpus cpu_devices restarts grace port python" "" "$@"
need workdir
need_positive processes port
need_whole restarts grace
need_recipes
((${#pass[@]} == 0)) || fail "--pass: there is nothing to pass flags to here; flags of the stage go after --"
if [[ -n $gpus ]]; then
  need_positive gpus
  ((gpus % processes == 0)) || fail "--gpus=$gpus does not divide over --processes=$processes"
fi
if [[ -n $cpu_devices ]]; then
  need_positive cpu_devices
  [[ -z $gpus ]] || fail "--gpus and --cpu-devices exclude each other"
fi
((processes == 1)) || [[ -n $gpus$cpu_devices ]] ||
  fail "--processes=$processes: say what they share, --gpus=8, or give --cpu-devices=1 to each"
need_program "$python" "make it with make .venv/.ready, or give --python"

# start_process INDEX: with the variables by which the processes find each other (docs/guide.md).
start_process() {
  local settings=() each first
  if ((processes > 1)); then
    settings+=(MLP_MEMORY_COORDINATOR="localhost:$port" MLP_MEMORY_PROCESSES="$processes" MLP_MEMORY_PROCESS="$1")
  fi
  if [[ -n $gpus ]]; then
    each=$((gpus / processes))
    first=$(($1 * each))
    settings+=(CUDA_VISIBLE_DEVICES="$(seq --separator=, "$first" "$((first + each - 1))")")
  fi
  [[ -z $cpu_devices ]] || settings+=(JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$cpu_devices")
  start env "${settings[@]}" "$python" -m mlp_memory "${words[@]}"
}

signal_processes() {
  local process
  for process in $(jobs -rp); do kill "-$1" "$process" 2>/dev/null || true; done
}

# Waits for what was told to end, and kills it after the grace. A second SIGTERM would cut short the
# checkpoint that the first one asked for.
await_end() {
  local deadline=$((SECONDS + grace))
  while [[ -n $(jobs -rp) ]] && ((SECONDS < deadline)); do sleep 0.2; done
  signal_processes KILL
  wait
}

stopped=0
trap 'stopped=130; signal_processes TERM' INT
trap 'stopped=143; signal_processes TERM' TERM
set_words "$workdir"
for ((starts = 1; ; starts++)); do
  for ((process = 0; process < processes; process++)); do start_process "$process"; done
  if $dry_run; then
    echo wait
    exit 0
  fi
  code=0
  for ((left = processes; left && !code && !stopped; left--)); do
    wait -n || code=$?
  done
  if ((stopped)); then
    await_end
    echo "stopped; the same command goes on from here" >&2
    exit "$stopped"
  fi
  ((code)) || exit 0
  signal_processes TERM
  await_end
  if ((code == 2 || code == 130 || code == 143 || starts > restarts)); then exit "$code"; fi
  echo "a process ended with exit code $code: start $((starts + 1)) of $((restarts + 1))" >&2
done
