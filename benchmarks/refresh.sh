#!/usr/bin/env bash
# Measures all tables of README.md and docs/benchmarks.md again, on a machine with a Hopper GPU that
# has torch and a built library in python/sparse_fmha:
#
#   benchmarks/refresh.sh [STEP...]   sequences skipping blocks grids stripes dilation host_time small
#                                     backward key_bias query_rows score_sums decode serving models
#                                     vision methods frontier frontier_trained other_gpus
#                                     other_gpus_decode calibration skipping_gradients scaling
#
# Default: all but scaling, which needs two GPUs.
#
# A peer that a step compares with and that does not load stops the program before the first step.
# Results go to $OUT (build/refresh), laid out as benchmarks/results. The last lines are a table of
# the steps; the status is non-zero if any of them failed. Afterwards copy the files into
# benchmarks/results, remove the older ones of the same table and device, and run
# `python -m benchmarks.tables.readme`.
#
#   PYTHON=python3          the interpreter that has torch
#   WITHOUT=fa3,vsa,sta     peers to leave out; the results and the table of the steps name them
#   LIMIT=600               seconds after which a step is stopped; what it measured may be kept
#   SPARSE_FMHA_COMMIT=...  `git describe --always --dirty --abbrev=40`, where there is no .git
set -uo pipefail
cd "$(dirname "$0")/.."
source tools/gpu_steps.sh

known=(sequences skipping blocks grids stripes dilation host_time small backward key_bias query_rows
  score_sums decode serving models vision methods frontier frontier_trained other_gpus
  other_gpus_decode calibration skipping_gradients scaling)
steps=("$@")
((${#steps[@]})) || steps=("${known[@]:0:${#known[@]}-1}")
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/refresh}
LIMIT=${LIMIT:-600}
WITHOUT=${WITHOUT:-}
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1
# What a step compares with, where that is not fixed.
declare -A peers=(
  [sequences]=cudnn,flash2,fa3 [skipping]=fa3 [blocks]=vsa,flex [grids]=cudnn,fa3,sta
  [host_time]=fa3
)

measure() { timeout "$LIMIT" "$PYTHON" -m "$@"; }
cases() {
  measure benchmarks --device cuda --l2 cold --out "$OUT" \
    --peers "${peers[$step]}" --without "$WITHOUT" "$@"
}
study() { local name=$1; shift; measure "benchmarks.studies.$name" --out "$OUT/$name" "$@"; }

step_sequences() { cases --case 'fmha/*' --iterations 10; }
step_skipping() { cases --case 'skip/*' --iterations 10; }
step_blocks() { cases --case 'bs/*' --case 'select/*' --iterations 12; }
step_grids() { cases --case 'na/*'; }
step_stripes() { study stripes; }
step_host_time() { study host_time --dtype bfloat16 --without "$WITHOUT"; }
step_small() { study small; }
step_backward() { study backward; }
step_key_bias() { study key_bias; }
step_query_rows() { study query_rows; }
step_score_sums() { study score_sums; }
step_decode() { study decode --limit "$((LIMIT / 2))"; }
step_serving() { study serving; }
step_models() { study models; }
step_dilation() { study dilation; }
step_vision() { study vision; }
step_methods() { study methods; }
step_frontier() { study frontier --length 32768 --plot "$OUT/frontier/error.png"; }
step_frontier_trained() {
  measure benchmarks.studies.frontier --inputs trained --out "$OUT/frontier_trained" \
    --plot "$OUT/frontier_trained/error.png"
}
step_other_gpus() { study other_gpus; }
step_other_gpus_decode() { study other_gpus_decode; }
step_calibration() { measure benchmarks.studies.calibrate --out "$OUT/calibration"; }
step_skipping_gradients() { study skipping_gradients; }
step_scaling() {
  timeout "$LIMIT" "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node gpu \
    -m benchmarks.studies.scaling --out "$OUT/scaling"
}

check_peers() {
  local step name problem all=
  for step in "${steps[@]}"; do
    all+=${peers[$step]:+,${peers[$step]}}
    for name in ${WITHOUT//,/ }; do
      [[ ,${peers[$step]:-}, != *,$name,* ]] || notes[$step]+="${notes[$step]:+, }without $name"
    done
  done
  [[ -n $all ]] || return 0
  problem=$("$PYTHON" -m benchmarks --list --device cuda --peers "${all:1}" --without "$WITHOUT" \
    2>&1 >/dev/null) || die "${problem##*error: }; WITHOUT=NAMES leaves peers out"
}

check_steps "${known[@]}"
need_library_and_gpu
check_peers
run_steps
