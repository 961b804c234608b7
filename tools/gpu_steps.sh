# Sourced by tests/gpu/run.sh and benchmarks/refresh.sh: checks of what they need, and their steps.
# They set `steps`, PYTHON and OUT, and define a function step_NAME for each step. `notes` has what
# the table says of a step besides its result.
declare -A notes=()

die() { echo "error: $*" >&2; exit 2; }

# check_steps KNOWN...: each of the steps is one of these.
check_steps() {
  local step
  for step in "${steps[@]}"; do
    [[ " $* " == *" $step "* ]] || die "unknown step $step; there are $*"
  done
}

need_library_and_gpu() {
  [[ -f python/sparse_fmha/libsparse_fmha.so ]] ||
    die "python/sparse_fmha/libsparse_fmha.so is missing; build it, or unpack a wheel there"
  "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    die "$PYTHON needs torch with a CUDA device; set PYTHON to one that has it"
}

# Runs the steps, each with a log in OUT, prints a table of them and exits.
run_steps() {
  local step result summary=() status=0
  mkdir -p "$OUT"
  for step in "${steps[@]}"; do
    SECONDS=0
    result=ok
    "step_$step" 2>&1 | tee "$OUT/$step.log" || { result=FAILED && status=1; }
    summary+=("$(printf '%-12s %-7s %5d s  %s' "$step" "$result" "$SECONDS" \
      "$OUT/$step.log${notes[$step]:+  ${notes[$step]}}")")
  done
  printf '\n%s\n' "step         result     time  log"
  printf '%s\n' "${summary[@]}"
  exit $status
}
