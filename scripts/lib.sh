# Shared by the scripts; sourced from the root of the repository. Not a program.

venv=${DECOTRAIN_VENV:-.venv}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
state=$venv/decotrain    # stamps: what was set up from which inputs
log=${TMPDIR:-/tmp}/decotrain-setup.$$.log
started=${DECOTRAIN_STARTED:-$(date +%s)}
export DECOTRAIN_STARTED=$started
trap 'rc=$?; [ "$rc" != 0 ] || rm -f "$log"' EXIT

stage() { printf '[%4ds] %s\n' "$(($(date +%s) - started))" "$*"; }

fail() {
  echo "error: $*" >&2
  exit 1
}

quietly() {  # a command whose output matters only when it fails
  "$@" >"$log" 2>&1 </dev/null || {
    tail -n 80 "$log" >&2
    fail "failed: $*"
  }
}

last_line() { tail -n 1 "$1"; }

have_fuzzer() {  # clang 19 that can link libFuzzer
  command -v clang++-19 >/dev/null || return 1
  local out rc=0
  out=$(mktemp)
  echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' |
    clang++-19 -fsanitize=fuzzer,address -x c++ - -o "$out" 2>/dev/null || rc=1
  rm -f "$out"
  return $rc
}
