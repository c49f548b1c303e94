#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster: fills in launch/gke_jobset.yaml and applies it.
#
#   ./launch/gke.sh --context=gke_PROJECT_ZONE_CLUSTER --name=run1 --image=REGISTRY/dlc:1 \
#     --accelerator=tpu-v6e-slice --topology=8x8 --hosts=16 --chips=4 [--slices=1] -- \
#     python -m dlc_jax.main --config=configs/imagenet256.py --workdir=gs://BUCKET/run1
#
# --hosts and --chips are of one slice and of one host: hosts x chips is the product of the
# topology. The image holds the checkout as its working directory, with `pip install -e .[tpu,gs]`.
# `kubectl --context=… logs -f -l jobset.sigs.k8s.io/jobset-name=run1` reads along, and
# `kubectl --context=… delete jobset run1` stops: each pod gets SIGTERM, and 5 minutes to save.
# --dry-run prints the filled-in file and the command, and runs nothing.
set -euo pipefail

die() { echo "gke.sh: $*" >&2; exit 2; }

context="" name="" image="" accelerator="" topology="" hosts="" chips="" slices=1 dry=""
while [[ $# -gt 0 ]]; do
  case $1 in
    --context=* | --name=* | --image=* | --accelerator=* | --topology=* | --hosts=* | --chips=* | \
      --slices=*) key=${1%%=*}; printf -v "${key#--}" %s "${1#*=}" ;;
    --dry-run) dry=1 ;;
    --) shift; break ;;
    *) die "unknown argument '$1'; the command to run comes after --" ;;
  esac
  shift
done
for key in context name image accelerator topology hosts chips slices; do
  [[ ${!key} ]] || die "give --$key=…; it has no default"
  [[ ${!key} != *[^a-zA-Z0-9_./:@-]* ]] || die "--$key=${!key} has a character that is not allowed"
done
for key in hosts chips slices; do
  [[ ${!key} =~ ^[1-9][0-9]*$ ]] || die "--$key=${!key} is not a positive whole number"
done
[[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || die "--topology=$topology; expected as in 4x8"
((hosts * chips == ${topology//x/*})) ||
  die "--topology=$topology is not --hosts=$hosts with --chips=$chips each"
[[ $# -gt 0 ]] || die "give the command to run after --"

command=""  # as a list of JSON
for word; do
  [[ $word != *$'\n'* ]] || die "an argument of the command has a line break"
  word=${word//\\/\\\\}
  command+="${command:+, }\"${word//\"/\\\"}\""
done
text=$(<"$(dirname "${BASH_SOURCE[0]}")/gke_jobset.yaml")
text=${text//JOB_NAME/"$name"} text=${text//ACCELERATOR/"$accelerator"}
text=${text//TOPOLOGY/"$topology"} text=${text//SLICES/"$slices"} text=${text//HOSTS/"$hosts"}
text=${text//CHIPS/"$chips"}
text=${text/COMMAND/"[$command]"} text=${text/IMAGE/"$image"}  # the image's line comes first
apply=(kubectl --context="$context" apply -f -)
if [[ $dry ]]; then
  printf '%s\n' "$text"
  echo "# ${apply[*]}"
else
  "${apply[@]}" <<<"$text"
fi
