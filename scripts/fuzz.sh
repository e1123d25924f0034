#!/usr/bin/env bash
# Builds the fuzzers of csrc/fuzz/ and runs each for a while, from the committed corpus; then those
# of tests/fuzz/ with atheris. What they find lies in build/fuzz/. FUZZ_S: seconds for each (30).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh

seconds=${FUZZ_S:-30}

fuzz_core() {
  quietly cmake --preset fuzz
  quietly cmake --build --preset fuzz -j "$(nproc)"
  for source in csrc/fuzz/fuzz_*.cpp; do
    name=$(basename "$source" .cpp)
    [ -f "$source" ] || fail "no fuzzers in csrc/fuzz"
    mkdir -p "build/fuzz/found/$name"
    stage "$name, $seconds s"
    "build/fuzz/$name" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 \
      -artifact_prefix="build/fuzz/$name-" "build/fuzz/found/$name" \
      "csrc/fuzz/corpus/${name#fuzz_}" >"build/fuzz/$name.log" 2>&1 || {
      tail -n 40 "build/fuzz/$name.log"
      fail "$name found something (above; the input is build/fuzz/$name-*)"
    }
    last_line "build/fuzz/$name.log"
  done
}

fuzz_python() {
  for folder in tests/fuzz/corpus/*/; do
    name=$(basename "$folder")
    mkdir -p "build/fuzz/found/$name"
    stage "$name, $seconds s"
    python -m tests.fuzz "$name" "$seconds" "build/fuzz/found/$name" \
      >"build/fuzz/$name.log" 2>&1 || {
      tail -n 40 "build/fuzz/$name.log"
      fail "$name found something (above; the input is build/fuzz/found/$name-*)"
    }
    last_line "build/fuzz/$name.log"
  done
}

if ! have_fuzzer && [ -n "${CI:-}" ]; then scripts/setup.sh fuzz; fi
if [ -d "$venv/bin" ]; then export PATH="$venv/bin:$PATH"; fi
if have_fuzzer; then
  fuzz_core
else
  echo "fuzzers of the core not run: no clang++-19 with libFuzzer (scripts/setup.sh fuzz)"
fi
if [ -n "${CI:-}" ] && ! python -c 'import atheris' 2>/dev/null; then
  quietly python -m pip install -c constraints.txt atheris
fi
if python -c 'import atheris' 2>/dev/null; then
  fuzz_python
else
  echo "fuzzers of messages, record and checkpoint not run: pip install -c constraints.txt atheris"
fi
