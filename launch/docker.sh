#!/usr/bin/env bash
# Builds the image of launch/Dockerfile and runs a job in it.
set -euo pipefail
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

usage() {
  cat <<'END'
Builds an image from the lock and runs a stage in it, or pushes it for launch/gke_xpk.sh:

  launch/docker.sh --device=cuda13 --workdir=runs/demo --gin-file=gin_configs/recipes/demo.gin
  launch/docker.sh --device=tpu --image=REGISTRY/mlp-memory:tpu --push

A local workdir is mounted and its files are yours. `docker stop` and Ctrl-C save a checkpoint first;
the same command goes on.

The container:
  --device DEVICE     cpu, cuda12, cuda13 or tpu: the extra of jax that the image holds
  --image IMAGE       (mlp-memory:DEVICE)
  --push              push the image after building it; without --workdir nothing is run
  --pass FLAG         one more flag for docker run, as --pass=--volume=/data:/data; may be given again

END
  common_flags
}

device='' image='' push=false
parse "device image" "push" "$@"
need device
[[ $device =~ ^(cpu|cuda12|cuda13|tpu)$ ]] || fail "--device=$device: give cpu, cuda12, cuda13 or tpu"
image=${image:-mlp-memory:$device}
$push || need workdir
need_recipes_of_checkout
need_program docker "install Docker"

run docker build --file="$root/launch/Dockerfile" --build-arg=DEVICE="$device" --tag="$image" "$root"
! $push || run docker push "$image"
[[ -n $workdir ]] || exit 0

flags=(--rm --init --stop-timeout=120)
case $device in
  cuda*) flags+=(--gpus=all --ipc=host) ;; # NCCL shares memory between processes
  tpu) flags+=(--privileged --network=host) ;;
esac
if [[ $workdir =~ ^[a-z0-9]+:// ]]; then
  set_words "$workdir"
else
  run mkdir -p "$workdir" # else Docker makes it, for root
  [[ $workdir == /* ]] || workdir=$PWD/$workdir
  flags+=(--user="$(id -u):$(id -g)" --env=HOME=/tmp --volume="$workdir:/workdir")
  set_words /workdir
fi
run docker run "${flags[@]}" "${pass[@]}" "$image" "${words[@]}"
