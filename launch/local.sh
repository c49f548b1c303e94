#!/usr/bin/env bash
# Run a command in this repository's own Python environment, which is made on first use:
#
#   ./launch/local.sh python -m dlc_jax.main --config=configs/quickstart.py
#   ./launch/local.sh pytest
#
# The environment is .venv beside pyproject.toml, with the package installed editable. It is brought
# up to date when pyproject.toml or the extras change, and made again when an install was
# interrupted or the folder moved; otherwise nothing is done. The working directory stays where you
# are, and the command replaces this script: its exit code and its signals are its own. Made with uv
# when uv is on PATH (which does not read pip.conf: give it UV_FIND_LINKS, UV_INDEX_URL), else with
# venv and pip.
#
#   DLC_EXTRAS=dev,torch   extras of pyproject.toml to install (default: dev)
#   DLC_VENV=DIR           another place for the environment
#   GLIBC_TUNABLES=        as it is given; else glibc takes huge pages, which saves a fifth of the
#                          time of training on a CPU
set -euo pipefail

die() { echo "local.sh: $*" >&2; exit 2; }

[[ $# -gt 0 ]] ||
  die "no command given; usage: ./launch/local.sh CMD [ARGUMENT…], e.g. ./launch/local.sh pytest"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
extras=${DLC_EXTRAS-dev}
venv=${DLC_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
stamp=$venv/.dlc_stamp
want="$root $venv|$extras|$(cksum <"$root/pyproject.toml")"
is_current() { [[ -f $stamp && $(<"$stamp") == "$want" ]]; }

install() {
  local python="" uv="" candidate
  local probe="import sys, venv, ensurepip; sys.version_info >= (3, 11) and print(sys.executable)"
  # uv needs neither; some systems package them apart
  if uv=$(command -v uv); then probe=${probe/, venv, ensurepip/}; fi
  for candidate in python3.13 python3.12 python3.11 python3; do
    python=$("$candidate" -I -c "$probe" 2>/dev/null) && [[ -n $python ]] && break
  done
  [[ -n $python ]] || die "no Python >= 3.11 with venv and pip on PATH" \
    "(tried python3.13, python3.12, python3.11, python3); install one, or uv"
  # The lock belongs to the open file: it ends with the last process that holds it, even after
  # kill -9.
  exec 9<"$root/pyproject.toml"
  "$python" -I -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
  if is_current; then return; fi  # another start did it meanwhile
  echo "local.sh: installing [$extras] into $venv with ${uv:-pip}, about a minute (once)" >&2
  mkdir -p "$venv"
  # Interrupted, or moved with its absolute paths: nothing in it can be trusted.
  if [[ -f $stamp && $(<"$stamp") != "$root $venv|"* ]]; then
    find "$venv" -mindepth 1 -maxdepth 1 ! -name .dlc_stamp -exec rm -rf {} +
  fi
  echo installing >"$stamp"
  if [[ -n $uv ]]; then
    [[ -x $venv/bin/python ]] || uv venv --quiet --allow-existing --python "$python" "$venv"
    uv pip install --quiet --python "$venv/bin/python" -e "$root${extras:+[$extras]}"
  else
    [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
    "$venv/bin/python" -m ensurepip >/dev/null  # an environment that uv made has no pip
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      -e "$root${extras:+[$extras]}"
  fi >&2 || die "the install failed, see above; the next start tries again"
  echo "$want" >"$stamp"
}

is_current || install
exec 9<&-
export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
unset PYTHONHOME
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
exec "$@"
