#!/usr/bin/env bash
# A job on all workers of a Cloud TPU VM, which is asked for as a queued resource.
set -euo pipefail
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

usage() {
  cat <<'END'
Asks for a TPU slice, waits until it is there, installs this checkout on its workers and runs a stage
on all of them:

  launch/tpu_vm.sh --name=memory --type=v5p-64 --zone=us-east5-a --spot --delete \
      --workdir=gs://BUCKET/llama2 --gin-file=gin_configs/recipes/paper_llama2_7b_wikipedia.gin

Give the same command again after an interruption: a slice that is there is used, one that was
preempted is asked for anew, a process that still runs on it saves a checkpoint and ends, and the job
goes on. On a slice of several hosts give --stage: what all hosts do together (pretrain, import,
distill, joint, baseline, export); do the other stages on one machine outside of it. Have your key loaded (ssh-add ~/.ssh/google_compute_engine), and start this in tmux: the job
hangs on its ssh connections.

The machines:
  --name NAME         of the queued resource and of its node
  --type TYPE         v5p-64, v5litepod-256, v6e-16, v4-32 ...
  --zone ZONE
  --project PROJECT   (gcloud's own default)
  --runtime-version V software of the machines (chosen by type)
  --spot              cheaper, may be taken away at any time
  --reserved          from your reservation
  --wait-minutes N    how long to wait for the slice (120)
  --poll-seconds N    between two looks at its state (30)
  --delete            give the slice back at the end, however the job ended
  --pass FLAG         one more flag for `queued-resources create`; may be given again

END
  common_flags
}

name='' type='' zone='' project='' runtime_version='' wait_minutes=120 poll_seconds=30
spot=false reserved=false delete=false
parse "name type zone project runtime_version wait_minutes poll_seconds" "spot reserved delete" "$@"
need name type zone workdir
need_bucket
need_positive wait_minutes
need_whole poll_seconds
need_recipes_of_checkout
! $spot || ! $reserved || fail "--spot and --reserved exclude each other"
if [[ -z $runtime_version ]]; then
  case $type in
    v5p-*) runtime_version=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
    v6e-*) runtime_version=v2-alpha-tpuv6e ;;
    v[234]-*) runtime_version=tpu-ubuntu2204-base ;;
    *) fail "--type=$type is not known: give v5p-64, v5litepod-256, v6e-16 or v4-32, or --runtime-version too" ;;
  esac
fi
need_program gcloud "install the Google Cloud CLI"

place=(--zone="$zone")
[[ -z $project ]] || place+=(--project="$project")
queue=(gcloud compute tpus queued-resources)
look=("${queue[@]}" describe "$name" "${place[@]}" "--format=value(state.state)")
remove=("${queue[@]}" delete "$name" "${place[@]}" --force --quiet)
create=("${queue[@]}" create "$name" --node-id="$name" --accelerator-type="$type"
  --runtime-version="$runtime_version" "${place[@]}")
! $spot || create+=(--spot)
! $reserved || create+=(--reserved)
create+=("${pass[@]}")

on_all_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

wait_until_active() {
  local state deadline=$((SECONDS + 60 * wait_minutes))
  ! $dry_run || echo "# every $poll_seconds s, for $wait_minutes minutes at most, until it says ACTIVE:"
  while true; do
    ask state "${look[@]}"
    ! $dry_run || return 0
    echo "$(date +%H:%M:%S) $name is ${state:-not to be seen}" >&2
    case $state in
      ACTIVE) return 0 ;;
      FAILED | SUSPEND*)
        fail "$name is $state: ${queue[*]} describe $name ${place[*]} says why; the same command asks again" 1
        ;;
    esac
    ((SECONDS < deadline)) ||
      fail "$name is ${state:-not to be seen} after $wait_minutes minutes: the same command goes on waiting" 1
    sleep "$poll_seconds"
  done
}

! $delete || trap 'run "${remove[@]}"' EXIT

ask state "${look[@]}"
if [[ $state == FAILED || $state == SUSPEND* ]]; then # preempted: such a request never comes back
  run "${remove[@]}"
  state=
fi
[[ -n $state ]] || run "${create[@]}"
wait_until_active

archive=${TMPDIR:-/tmp}/mlp_memory-$name.tar.gz
run tar --create --gzip --file="$archive" --directory="$root" --exclude-vcs \
  --exclude='./.venv*' --exclude=./runs --exclude=__pycache__ .
run gcloud compute tpus tpu-vm scp "$archive" "$name:mlp_memory.tar.gz" "${place[@]}" --worker=all

# An earlier process is told once, since a second SIGTERM would cut short the checkpoint that the first
# asked for. [.] keeps the shell that looks for it from finding itself. The images have an older Python
# than this project takes, so uv brings one.
earlier='"[.]venv/bin/python -m mlp_memory"'
on_all_workers "timeout 600 bash -c 'pkill --full $earlier; while pgrep --full $earlier; do sleep 5; done' \
&& mkdir -p mlp_memory && tar --extract --gzip --file=mlp_memory.tar.gz --directory=mlp_memory && cd mlp_memory \
&& python3 -m pip install --quiet --user uv \
&& { test -x .venv/bin/python || python3 -m uv venv --quiet --python=3.12 .venv; } \
&& python3 -m uv pip install --quiet --python=.venv/bin/python --requirement=requirements.lock 'jax[tpu]' \
&& python3 -m uv pip install --quiet --python=.venv/bin/python --no-deps --no-build-isolation --editable=."

set_words "$workdir"
on_all_workers "cd mlp_memory && exec .venv/bin/python -m mlp_memory $(quoted "${words[@]}")"
