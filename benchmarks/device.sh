#!/usr/bin/env bash
# Everything that needs a GPU, in nine minutes at most: tests/device, then the benchmarks, the most telling first.
#
#     benchmarks/device.sh [--rehearse]
#
# Each section writes its table into $OUT (build/device where unset) as it goes, so that what is there counts if the
# time ends. --rehearse runs all of it on CPUs, in small. Needs jax, numpy, jaxtyping and pytest; for training steps flax
# and optax; for vs_torch.py PyTorch. Exits with 1 if a section failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
out=${OUT:-build/device}
python=${PYTHON:-python3}
end=$((SECONDS + ${DLC_DEVICE_SECONDS:-540}))
failures=0
rehearse=()
if [ "${1:-}" = --rehearse ]; then
  rehearse=(--rehearse)
  export JAX_PLATFORMS=cpu
else
  export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}  # the tests compute their float64 on the CPUs
  # tests/conftest.py compiles without optimization unless a level is given
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=3"
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=3
export DLC_COMMIT=${DLC_COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
mkdir -p "$out"

# section NAME SECONDS COMMAND...: its output, errors too, goes into $out/NAME.md and to the terminal
section() {
  local name=$1 most=$2 left=$((end - SECONDS)) started=$SECONDS code=0
  shift 2
  if [ "$left" -lt 10 ]; then
    echo "== $name: no time left" | tee "$out/$name.md"
    failures=$((failures + 1))
    return
  fi
  [ "$left" -lt "$most" ] && most=$left
  echo "== $name, $most seconds at most: $*"
  timeout --kill-after=5 "$most" "$@" 2>&1 | tee "$out/$name.md" || code=$?
  echo "== $name: exit $code after $((SECONDS - started)) s" | tee -a "$out/$name.md"
  [ "$code" -eq 0 ] || failures=$((failures + 1))
}

# benchmark NAME SECONDS ARGUMENTS...: of benchmarks/NAME.py, where there is one
benchmark() {
  local name=$1 most=$2
  shift 2
  if [ -f "benchmarks/$name.py" ]; then
    section "$name" "$most" "$python" "benchmarks/$name.py" ${rehearse[@]+"${rehearse[@]}"} "$@"
  else
    echo "== $name: no benchmarks/$name.py"
  fi
}

# beside each other, for compiling takes longest: none may take the whole memory
[ ${#rehearse[@]} -eq 0 ] && workers=8 || workers=0
tests=("$python" -m pytest -n "$workers" -v -m device -W default::DeprecationWarning -p no:cacheprovider tests/device)
section tests 150 env XLA_PYTHON_CLIENT_PREALLOCATE=false "${tests[@]}"
benchmark attention 150
benchmark train_step 150 --models XL encoder --attention none pallas_gpu cudnn
benchmark vs_torch 120 --models XL --batch 64 --compile --attention pallas_gpu
benchmark sampling 90 --models XL --guidance 1 --attention none pallas_gpu
echo "== $failures of the sections failed; tables are in $out"
[ "$failures" -eq 0 ]
