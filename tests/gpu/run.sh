#!/usr/bin/env bash
# Tests and measures a prebuilt library on a machine with a Hopper GPU that has torch, no network:
#
#   tests/gpu/run.sh [STEP...]        tests, sanitizer, bench, ncu; default: all of them
#
# The library is python/sparse_fmha/libsparse_fmha.so, as the build or a wheel leaves it there.
# Logs go to $OUT (build/gpu). The last lines are a table of the steps; the status is non-zero
# if any of them failed.
#
#   PYTHON=python3        the interpreter that has torch
#   WHEELS=DIR            wheels that the machine lacks, such as pytest or fa3-fwd: unpacked for
#                         this run, nothing is installed
#   BENCH_ARGS='--quick'  arguments for python -m benchmarks
#   NCU_CASE=NAME         the case that ncu captures
set -uo pipefail
cd "$(dirname "$0")/../.."
source tools/gpu_steps.sh

steps=("$@")
((${#steps[@]})) || steps=(tests sanitizer bench ncu)
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
NCU_CASE=${NCU_CASE:-fmha/d128/full/8k}
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1

need() { type -P "$1" >/dev/null || { echo "$1 is not on PATH"; return 1; }; }

check_steps tests sanitizer bench ncu
need_library_and_gpu
if [[ -n ${WHEELS:-} ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl ||
    die "could not unpack the wheels in WHEELS=$WHEELS"
  # fastvideo-kernel brings a libcuda of its own, which fails on an older driver.
  driver=$(ldconfig -p | awk '/libcuda\.so\.1 .*x86-64/ { print $NF; exit }')
  for file in "$site"/fastvideo_kernel.libs/libcuda-*; do
    [[ -e $file && -n $driver ]] && ln -sf "$driver" "$file"
  done
  PYTHONPATH="$PYTHONPATH:$site"
fi

step_tests() {
  "$PYTHON" -c 'import pytest' 2>/dev/null ||
    { echo "pytest is missing: put its wheels in WHEELS"; return 1; }
  "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu
}

step_sanitizer() {
  need compute-sanitizer || return 1
  local tool failed=0 filter=--kernel-name log=$OUT/racecheck.log
  compute-sanitizer --help | grep -e "$filter" >/dev/null || filter=--kernel-regex  # older name
  for tool in memcheck synccheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$filter" kns=sparse_fmha \
      "$PYTHON" tests/gpu/sanitize.py || failed=1
  done
  echo "== racecheck, whole output in $log"
  compute-sanitizer --tool racecheck --print-limit 1000000 "$filter" kns=sparse_fmha \
    "$PYTHON" tests/gpu/sanitize.py >"$log" 2>&1 || { tail -n 20 "$log"; failed=1; }
  "$PYTHON" tests/support/racecheck.py "$log" || failed=1
  return $failed
}

step_bench() {
  # shellcheck disable=SC2086
  "$PYTHON" -m benchmarks --device cuda --out "$OUT" ${BENCH_ARGS:-}
}

step_ncu() {
  need ncu || return 1
  local ignored
  ignored=$(mktemp -d)  # times under a profiler are no result
  ncu --set full --clock-control none --kernel-name regex:attention_kernel --launch-skip 2 \
    --launch-count 1 --force-overwrite --export "$OUT/kernel" \
    "$PYTHON" -m benchmarks --device cuda --case "$NCU_CASE" --peers none --l2 warm \
    --iterations 1 --warmup 1 --out "$ignored" &&
    ncu --import "$OUT/kernel.ncu-rep" --page details
}

run_steps
