#!/usr/bin/env bash
# Sets up what a fresh Debian or Ubuntu with Python >= 3.10 lacks: packages of the system (only when
# something is missing), a virtual environment in .venv, decotrain in it. Fast when nothing changed.
#
#   scripts/setup.sh run     what `decotrain` needs
#   scripts/setup.sh dev     the same, and what the tests and checks need
#   scripts/setup.sh fuzz    clang with libFuzzer (system packages only)
#
# The environment may say
#   DECOTRAIN_PYTHON        the interpreter to build the environment from (default: python3)
#   DECOTRAIN_VENV          where the environment lies (default: .venv)
#   DECOTRAIN_TORCH_INDEX   an index of CPU builds of torch. Without it torch comes from pip's own
#                           index (PIP_INDEX_URL), which on Linux may bring gigabytes of CUDA
#                           libraries along; everything works with either build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh
trap 'echo "stopped; the same command goes on from here" >&2; rm -f "$log"; exit 130' INT

level=${1:-run}
case $level in run | dev | fuzz) ;; *) fail "unknown level '$level': say run, dev or fuzz" ;; esac
base_python=${DECOTRAIN_PYTHON:-python3}

# --- packages of the system

missing_openssl() {
  local header=/usr/include/openssl/ssl.h
  echo "#include <openssl/ssl.h>" | c++ -x c++ -fsyntax-only - 2>/dev/null || [ -e "$header" ] ||
    echo libssl-dev
}

missing_packages() {
  local probe
  command -v "$base_python" >/dev/null || { echo python3 python3-venv python3-dev; return; }
  "$base_python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
  probe='import os, sysconfig
raise SystemExit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
  "$base_python" -c "$probe" || echo python3-dev
  command -v g++ >/dev/null || echo g++
  missing_openssl
  if [ "$level" = dev ]; then
    echo '#include <doctest/doctest.h>' | g++ -x c++ -fsyntax-only - 2>/dev/null || echo doctest-dev
  fi
}

install_packages() {  # names of Debian packages
  [ $# -gt 0 ] || return 0
  command -v apt-get >/dev/null ||
    fail "missing here: $* (names of Debian packages); there is no apt-get: install them by hand"
  local as_root=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || fail "missing: $*; as root: apt-get install $*"
    as_root=(sudo)
    [ -t 0 ] || as_root=(sudo -n)
  fi
  local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -y)
  { "${apt[@]}" update && "${apt[@]}" install --no-install-recommends "$@"; } </dev/null \
    >"$log" 2>&1 || fail "could not install $*: $(last_line "$log"); as root: apt-get install $*"
}

check_python() {
  "$base_python" -c 'import sys; raise SystemExit(sys.version_info < (3, 10))' ||
    fail "$base_python is $("$base_python" -V 2>&1), decotrain needs 3.10: set DECOTRAIN_PYTHON"
}

# --- the virtual environment

pip_install() {
  "$venv/bin/python" -m pip install --disable-pip-version-check -q "$@" >"$log" 2>&1 </dev/null ||
    fail "pip could not install: $(grep -m1 ^ERROR "$log" || last_line "$log") (see $log)"
}

make_venv() {
  "$venv/bin/python" -c '' 2>/dev/null && return
  rm -rf "$venv"
  "$base_python" -m venv "$venv" >"$log" 2>&1 || fail "venv failed: $(last_line "$log")"
}

install_dependencies() {
  local torch=()
  [ -z "${DECOTRAIN_TORCH_INDEX:-}" ] || torch=(--index-url "$DECOTRAIN_TORCH_INDEX")
  pip_install -c constraints.txt pip  # Ubuntu 22.04's own cannot do what follows
  pip_install -c constraints.txt "${torch[@]}" torch
  "$venv/bin/python" scripts/requirements.py "$level" >"$state/requirements.txt"
  pip_install -c constraints.txt -r "$state/requirements.txt"
}

# Editable: the Python part is this folder, the core is built in build/editable.
install_decotrain() {
  local tests=OFF
  [ "$level" != dev ] || tests=ON
  PATH="$venv/bin:$PATH" pip_install --no-build-isolation --no-deps -e . \
    -C build-dir=build/editable -C "cmake.define.DT_TESTS=$tests"
}

dependencies_key() {
  { "$base_python" -V; echo "$level"; cat pyproject.toml constraints.txt; } | sha256sum
}

build_key() {
  { dependencies_key; find decotrain -name '*.py' | sort
    find csrc CMakeLists.txt -type f -print0 | sort -z | xargs -0 sha256sum; } | sha256sum
}

once() {  # stage name, key, command: runs the command unless it succeeded with this key before
  local stamp="$state/$1.$level.key"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$2" ]; then return; fi
  stage "$4"
  "$3"
  echo "$2" >"$stamp"
}

mapfile -t packages < <(missing_packages)
if [ "$level" = fuzz ]; then
  mapfile -t packages < <(missing_openssl)
  have_fuzzer || packages+=(clang-19 libclang-rt-19-dev)
fi
if [ ${#packages[@]} -gt 0 ]; then stage "system packages: ${packages[*]}"; fi
install_packages "${packages[@]}"
[ "$level" != fuzz ] || exit 0
check_python
"$venv/bin/python" -c '' 2>/dev/null || stage "virtual environment in $venv"
make_venv
mkdir -p "$state"
once dependencies "$(dependencies_key)" install_dependencies "dependencies, with pip"
once build "$(build_key)" install_decotrain "decotrain and its core"
