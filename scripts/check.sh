#!/usr/bin/env bash
# The checks of source text, one name each: the only place that says how they are called.
# scripts/test.sh, the pre-commit hooks and CI all come here.
#
#   scripts/check.sh format|lint|types|stub|cuda|arm|clang-tidy|attacks ...
#   scripts/check.sh fix          formats everything in place
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
if [ -d "$venv/bin" ]; then export PATH="$venv/bin:$PATH"; fi

cpp_files() { find csrc -name '*.cpp' -o -name '*.h' | grep -v ^csrc/third_party/; }
cpp_sources() { find csrc -name '*.cpp' | grep -v -e ^csrc/third_party/ -e ^csrc/fuzz/; }

check_format() {
  ruff format --check -q . || fail "ruff format: run scripts/check.sh fix"
  cpp_files | xargs clang-format --dry-run --Werror || fail "clang-format: run scripts/check.sh fix"
}

check_lint() {
  ruff check -q .
  local script
  for script in scripts/*.sh .ci/run; do bash -n "$script"; done
}

check_types() { mypy; }

check_stub() {  # the committed stub is what the build generates
  local built=build/editable/_core.pyi
  [ -f "$built" ] || fail "no $built: run scripts/setup.sh dev first"
  diff -u decotrain/_core.pyi "$built" ||
    fail "decotrain/_core.pyi is not what the core offers: cp $built decotrain/_core.pyi"
}

check_clang_tidy() {  # against the editable build's compile commands
  local build=build/editable
  [ -f $build/compile_commands.json ] || build=build/release
  [ -f $build/compile_commands.json ] || fail "no build yet: run scripts/setup.sh dev first"
  cpp_sources | sort | xargs -P "$(nproc)" -n 1 clang-tidy -p "$build" --quiet 2>/dev/null ||
    fail "clang-tidy found something (above)"
}

check_cuda() {  # the kernels compile for the two generations in use; they run where a GPU is
  if ! command -v nvcc >/dev/null; then
    echo "skipped: no nvcc"
    return
  fi
  local source arch
  for source in csrc/cuda/*.cu; do
    for arch in sm_80 sm_90; do
      nvcc -std=c++17 -fmad=false -ftz=false -prec-div=true -prec-sqrt=true -arch=$arch -Icsrc \
        -cubin -o /dev/null "$source" || fail "nvcc: $source for $arch"
    done
  done
}

check_arm() {  # the codecs' tests on an emulated 64-bit Arm
  local compiler=aarch64-linux-gnu-g++ emulator out
  emulator=$(command -v qemu-aarch64-static || command -v qemu-aarch64) || emulator=
  if [ -z "$emulator" ] || ! command -v "$compiler" >/dev/null; then
    echo "skipped: no $compiler or qemu-aarch64 (packages g++-aarch64-linux-gnu, qemu-user)"
    return
  fi
  out=$(mktemp -d)
  ln -s /usr/include/doctest "$out/doctest"
  "$compiler" -std=c++20 -O1 -ffp-contract=off -Icsrc -I"$out" -static \
    csrc/codec/*.cpp csrc/simd.cpp csrc/tests/main.cpp csrc/tests/test_codec.cpp \
    -o "$out/tests" || fail "the codecs do not compile for Arm"
  "$emulator" "$out/tests" --minimal || fail "the codecs' tests fail on Arm"
  rm -rf "$out"
}

check_attacks() {  # the tests of strangers against a core that the sanitizers watch
  local core
  core=$(find build/asan -maxdepth 1 -name '_core*.so' | head -n 1)
  [ -n "$core" ] || fail "no _core in build/asan: cmake --preset asan; cmake --build --preset asan"
  # Python itself is not built for it: no leaks are looked for, and what is freed is kept for a
  # while only, since these tests look at memory.
  LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=4 UBSAN_OPTIONS=print_stacktrace=1 \
    DECOTRAIN_TEST_CORE="$PWD/$core" pytest -q tests/attacks
}

fix() {
  ruff format -q .
  ruff check -q --fix .
  cpp_files | xargs clang-format -i
}

[ $# -gt 0 ] || fail "say which: format, lint, types, stub, cuda, arm, clang-tidy, attacks or fix"
for name in "$@"; do
  case $name in
    format) check_format ;;
    lint) check_lint ;;
    types) check_types ;;
    stub) check_stub ;;
    cuda) check_cuda ;;
    arm) check_arm ;;
    clang-tidy) check_clang_tidy ;;
    attacks) check_attacks ;;
    fix) fix ;;
    *) fail "unknown check '$name'" ;;
  esac
done
