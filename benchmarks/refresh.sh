#!/usr/bin/env bash
# Measures all tables of README.md and docs/benchmarks.md again, on a machine with a Hopper GPU that
# has torch and a built library in python/sparse_fmha:
#
#   benchmarks/refresh.sh [STEP...]   sequences skipping blocks grids stripes host_time backward
#                                     diffusion calibration scaling; default: all but scaling,
#                                     which needs two GPUs
#
# Results go to $OUT (build/refresh), laid out as benchmarks/results. The last lines are a table of
# the steps; the status is non-zero if any of them failed. Afterwards copy the files into
# benchmarks/results, remove the older ones of the same table and device, and run
# `python -m benchmarks.tables.readme`.
#
#   PYTHON=python3          the interpreter that has torch
#   LIMIT=600               seconds after which a step is stopped; what it measured may be kept
#   SPARSE_FMHA_COMMIT=...  `git describe --always --dirty --abbrev=40`, where there is no .git
set -uo pipefail
cd "$(dirname "$0")/.."
source tools/gpu_steps.sh

known=(sequences skipping blocks grids stripes host_time backward diffusion calibration scaling)
steps=("$@")
((${#steps[@]})) || steps=("${known[@]:0:9}")
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/refresh}
LIMIT=${LIMIT:-600}
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1

measure() { timeout "$LIMIT" "$PYTHON" -m "$@"; }
cases() { measure benchmarks --device cuda --l2 cold --out "$OUT" "$@"; }
study() { local name=$1; shift; measure "benchmarks.studies.$name" --out "$OUT/$name" "$@"; }

check_steps "${known[@]}"
need_library_and_gpu
has() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$1'))"; }

step_sequences() { cases --case 'fmha/*' --iterations 10; }
step_skipping() { cases --case 'skip/*' --iterations 10 --peers "$(peers fa3)"; }
step_blocks() { cases --case 'bs/*' --case 'select/*' --iterations 12 --peers "$(peers vsa,flex)"; }
step_grids() { cases --case 'na/*' --peers "$(peers cudnn,fa3,sta)"; }
step_stripes() { study stripes; }
step_host_time() { study host_time --dtype bfloat16; }
step_backward() { study backward; }
step_diffusion() { study diffusion --repeats 3; }
step_calibration() { measure benchmarks.studies.calibrate --out "$OUT/calibration"; }
step_scaling() {
  timeout "$LIMIT" "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node gpu \
    -m benchmarks.studies.scaling --out "$OUT/scaling"
}

# Those of a list of peers that can be imported here.
peers() {
  local name found=()
  for name in ${1//,/ }; do
    case $name in
      fa3) has fa3_fwd_interface || has flash_attn_interface || continue ;;
      vsa | sta) has fastvideo_kernel || continue ;;
    esac
    found+=("$name")
  done
  (IFS=,; echo "${found[*]:-none}")
}

run_steps
