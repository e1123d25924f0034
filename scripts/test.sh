#!/usr/bin/env bash
# Sets up everything, then runs all checks and tests that need no special machine. The order is
# cheap first. Arguments go to pytest, and then only pytest runs: scripts/test.sh tests/test_tidy.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh

stage "setting up"
scripts/setup.sh dev
export PATH="$venv/bin:$PATH"
if [ $# -gt 0 ]; then exec pytest "$@"; fi

jobs=$(nproc)
for check in format lint types stub cuda arm; do
  stage "check: $check"
  scripts/check.sh "$check"
done
stage "core's tests: release"
build/editable/dt_tests --minimal
for preset in asan tsan; do
  stage "core's tests: $preset"
  quietly cmake --preset "$preset"
  quietly cmake --build --preset "$preset" -j "$jobs"
  "build/$preset/dt_tests" --minimal
done
stage "check: attacks, under asan"
scripts/check.sh attacks
stage "check: clang-tidy"
scripts/check.sh clang-tidy
stage "fuzzers"
scripts/fuzz.sh
stage "pytest"
# Worker processes beside the tests' own peers: two are enough to fill two cores.
rc=0
pytest -n 2 --dist loadgroup --durations 10 || rc=$?
exit "$rc"
