#!/usr/bin/env bash
# A job on TPU slices of a GKE cluster, as a workload of xpk.
set -euo pipefail
# shellcheck source=launch/commands.sh
source "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

usage() {
  cat <<'END'
Submits a workload to a GKE cluster that xpk made, or makes it first. Build and push the image once:

  launch/docker.sh --device=tpu --image=REGISTRY/mlp-memory:tpu --push
  launch/gke_xpk.sh --cluster=pods --name=memory --type=v5litepod-256 --slices=2 --zone=us-west4-a \
      --image=REGISTRY/mlp-memory:tpu --workdir=gs://BUCKET/llama2 \
      --gin-file=gin_configs/recipes/paper_llama2_7b_wikipedia.gin

A machine that goes away has 120 s to save a checkpoint; the workload is then started again and goes
on there. The same command submits it again (xpk asks before it replaces one of that name). Flags are
those of xpk 1.16.

The machines:
  --cluster CLUSTER
  --name NAME         of the workload: lower case, digits and -, 40 characters at most
  --type TYPE         v5p-64, v5litepod-256, v6e-16 ...
  --slices N          of that type (1)
  --image IMAGE       as pushed
  --zone ZONE         --project PROJECT (both: gcloud's own default)
  --restarts N        after a crash or a lost machine (10); not after an error the user can mend
  --create-cluster    make the cluster first, with that many slices
  --spot              of that cluster: cheaper, may be taken away at any time
  --reservation NAME  of that cluster: machines you reserved
  --pass FLAG         one more flag for `xpk workload create`; may be given again

END
  common_flags
}

cluster='' name='' type='' slices=1 image='' zone='' project='' restarts=10 reservation=''
create_cluster=false spot=false
parse "cluster name type slices image zone project restarts reservation" "create_cluster spot" "$@"
need cluster name type image workdir
need_bucket
need_positive slices
need_whole restarts
need_recipes_of_checkout
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "--name=$name: give lower case letters, digits and -, 40 at most, the first a letter"
[[ $type =~ ^(v|tpu)[0-9] ]] || fail "--type=$type: give a TPU type, as v5p-64; for GPUs see launch/slurm.sh"
$create_cluster || { ! $spot && [[ -z $reservation ]]; } ||
  fail "--spot and --reservation say what a cluster is made of: give --create-cluster too"
! $spot || [[ -z $reservation ]] || fail "--spot and --reservation exclude each other"
need_program xpk "install it with pip install xpk"

place=()
[[ -z $zone ]] || place+=(--zone="$zone")
[[ -z $project ]] || place+=(--project="$project")

if $create_cluster; then
  capacity=(--on-demand)
  ! $spot || capacity=(--spot)
  [[ -z $reservation ]] || capacity=(--reservation="$reservation")
  run xpk cluster create --cluster="$cluster" --tpu-type="$type" --num-slices="$slices" "${place[@]}" "${capacity[@]}"
fi

# exec: xpk hands SIGTERM to what it started, which must be Python and not a shell around it.
# Exit code 2, the user's error, is not among those that restart (1; by xpk itself 127 to 255).
set_words "$workdir"
run xpk workload create --cluster="$cluster" --workload="$name" --tpu-type="$type" --num-slices="$slices" \
  "${place[@]}" --docker-image="$image" --max-restarts="$restarts" --restart-on-exit-codes=1 \
  --termination-grace-period-seconds=120 "${pass[@]}" \
  --command="exec python -m mlp_memory $(quoted "${words[@]}")"
