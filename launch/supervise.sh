#!/usr/bin/env bash
# Run a command again each time it ends early, such as a training run that was preempted:
#
#   ./launch/supervise.sh ./launch/local.sh python -m dlc_jax.main --config=configs/imagenet256.py
#
# It stops with the command's code when that is 0 (complete) or 2 (a mistake of the user). After any
# other code, or a signal, it waits and starts the command again: first after 5 seconds, then after
# twice as long each time, up to 5 minutes, and after 5 seconds again once a run lasted 10 minutes.
# SIGTERM, SIGINT and SIGHUP are passed on to the command; when it has ended, this script ends with
# its code.
#
#   --dry-run          as the first argument: print the command and run nothing
#   DLC_RESTARTS=N     give up after N restarts, with the last code (default: never)
#   DLC_BACKOFF=N      the first wait in seconds (default: 5)
set -euo pipefail

die() { echo "supervise.sh: $*" >&2; exit 2; }

dry=""
if [[ ${1-} == --dry-run ]]; then dry=1; shift; fi
[[ $# -gt 0 ]] || die "no command given; usage: ./launch/supervise.sh [--dry-run] CMD [ARGUMENT…]"
limit=${DLC_RESTARTS-} first=${DLC_BACKOFF:-5}
[[ $limit =~ ^[0-9]*$ ]] || die "DLC_RESTARTS is '$limit'; expected a whole number, such as 100"
[[ $first =~ ^[0-9]+$ ]] || die "DLC_BACKOFF is '$first'; expected whole seconds, such as 5"
command -v "$1" >/dev/null || die "command not found: $1"
if [[ $dry ]]; then printf '%q ' "$@"; echo; exit 0; fi

# The command gets a process group of its own: Ctrl-C in a terminal reaches it once, through us.
set -m
signals=0 asked="" told=""
tell() { if kill -s "$asked" "$!" 2>/dev/null; then told=$!; fi; }
# shellcheck disable=SC2329  # the traps call it
hear() { signals=$((signals + 1)) asked=$1; if [[ ${!:-} ]]; then tell; fi; }
trap 'hear TERM' TERM
trap 'hear INT' INT
trap 'hear HUP' HUP

# Waits for the last background process; sets `code` to its code. `wait` returns early when a signal
# comes, and when the process is suspended.
finish() {
  local before
  if [[ $asked && $told != "$!" ]]; then tell; fi  # asked just before the process existed
  while before=$signals; do
    code=0; wait "$!" 2>/dev/null || code=$?
    if [[ $before != "$signals" ]]; then continue; fi
    kill -0 "$!" 2>/dev/null || return 0
    sleep 1
  done
}

reason() {
  if ((code == 75)); then echo "stopped with code 75 (resumable)"
  elif ((code > 128)) && name=$(kill -l "$code" 2>/dev/null); then echo "was ended by SIG$name"
  else echo "failed with code $code"; fi
}

restarts=0 delay=$first code=0
while [[ -z $asked ]]; do
  start=$(date +%s)
  "$@" &
  finish
  if ((code == 0 || code == 2)) || [[ $asked ]]; then break; fi
  seconds=$(($(date +%s) - start))
  if ((seconds >= 600)); then delay=$first; fi
  what="$1 $(reason) after $seconds s"
  if [[ $limit ]] && ((restarts >= limit)); then
    echo "supervise.sh: $what; giving up after $restarts restarts" >&2
    break
  fi
  restarts=$((restarts + 1))
  echo "supervise.sh: $what; restart $restarts in $delay s" >&2
  ended=$code
  sleep "$delay" &
  finish
  code=$ended
  delay=$((2 * delay < 300 ? 2 * delay : 300))
done
exit "$code"
