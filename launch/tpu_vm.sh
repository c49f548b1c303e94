#!/usr/bin/env bash
# Train on one TPU slice of Google Cloud, from a request in the queue to its end:
#
#   tpu="--name=run1 --project=MY_PROJECT --zone=us-east5-a"
#   ./launch/tpu_vm.sh create $tpu --type=v6e-64 --version=v2-alpha-tpuv6e [--spot]
#   ./launch/tpu_vm.sh wait   $tpu         # until it is ACTIVE
#   ./launch/tpu_vm.sh setup  $tpu         # this checkout's last commit, on every worker
#   ./launch/tpu_vm.sh run    $tpu -- \
#     python -m dlc_jax.main --config=configs/imagenet256.py --workdir=gs://BUCKET/run1
#   ./launch/tpu_vm.sh logs   $tpu [--worker=0]
#   ./launch/tpu_vm.sh stop   $tpu         # SIGTERM: it saves and ends; `run` resumes
#   ./launch/tpu_vm.sh delete $tpu         # the machines too
#
# --dry-run prints the commands and runs nothing. The command goes on when you log out, and is
# started again when it fails (launch/supervise.sh). For several slices see launch/gke.sh.
set -euo pipefail

die() { echo "tpu_vm.sh: $*" >&2; exit 2; }

verbs="create, wait, setup, run, logs, stop or delete"
verb=${1-} name="" project="" zone="" type="" version="" spot="" worker=0 dry=""
[[ ", ${verbs/ or/,}," == *", $verb,"* ]] || die "'$verb' is not a verb; expected $verbs"
shift
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=* | --project=* | --zone=* | --type=* | --version=* | --worker=*)
      key=${1%%=*}; printf -v "${key#--}" %s "${1#*=}" ;;
    --spot) spot=$1 ;;
    --dry-run) dry=1 ;;
    --) shift; break ;;
    *) die "unknown argument '$1'; the command to run comes after --" ;;
  esac
  shift
done
for key in name project zone; do [[ ${!key} ]] || die "give --$key=…; it has no default"; done

go() {  # runs a command, or prints it as one may type it
  if [[ ! $dry ]]; then "$@"; return; fi
  local word words=""
  for word; do
    [[ $word != *[^a-zA-Z0-9_./:=,-]* ]] || word="'${word//\'/\'\\\'\'}'"
    words+="${words:+ }$word"
  done
  echo "$words"
}
tpus() { go gcloud compute tpus "$@" --project="$project" --zone="$zone"; }
on() { tpus tpu-vm ssh "$name" --worker="$1" --command="$2"; }  # which workers, what

case $verb in
  create)
    [[ $type ]] || die "give --type=…, such as v6e-64"
    [[ $version ]] || die "give --version=…, the machines' runtime, such as v2-alpha-tpuv6e"
    tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
      --runtime-version="$version" ${spot:+"$spot"} ;;
  wait)
    state="" before=""
    while [[ $state != ACTIVE ]]; do
      if [[ $state ]]; then sleep "${DLC_POLL:-30}"; fi
      state=$(tpus queued-resources describe "$name" --format='value(state.state)')
      if [[ $dry ]]; then echo "$state"; exit; fi
      [[ $state == "$before" ]] || echo "$(date +%T) $name is $state"
      before=$state
      [[ $state != FAILED && $state != SUSPEND* ]] || die "$name will not start; delete it"
    done ;;
  setup)
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
    git -C "$root" diff --quiet HEAD || echo "tpu_vm.sh: uncommitted changes are left out" >&2
    go mkdir -p "$root/build"
    go git -C "$root" archive --format=tar.gz --output="$root/build/dlc.tar.gz" HEAD
    tpus tpu-vm scp "$root/build/dlc.tar.gz" "$name:" --worker=all
    on all 'set -e; mkdir -p dlc; tar -xzf dlc.tar.gz -C dlc
python3 -c "import sys, ensurepip; assert sys.version_info >= (3, 11)" 2>/dev/null ||
  sudo apt-get -qqy -o DPkg::Lock::Timeout=300 install python3.11-venv
DLC_EXTRAS=tpu,gs dlc/launch/local.sh true' ;;
  run)
    [[ $# -gt 0 ]] || die "give the command to run after --"
    printf -v command ' %q' "$@"
    on all "cd dlc || exit 2
! kill -0 \$(cat run.pid) 2>&- || { echo 'already running; stop it first' >&2; exit 2; }
export DLC_EXTRAS=tpu,gs
setsid nohup ./launch/supervise.sh ./launch/local.sh$command </dev/null >>run.log 2>&1 &
echo \$! >run.pid" ;;
  logs) on "$worker" 'tail -n 100 -F dlc/run.log' ;;
  stop) on all "kill -TERM \$(cat dlc/run.pid)" ;;
  delete) tpus queued-resources delete "$name" --force --quiet ;;
esac
