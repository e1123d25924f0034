#!/usr/bin/env bash
# From a fresh clone to a trained model: sets up what is missing, then several peers on this machine
# train one byte-level language model. Arguments go to `decotrain train`, e.g. peers=4.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib.sh

stage "setting up"
scripts/setup.sh run
stage "training (Ctrl-C stops it cleanly)"
exec "$venv/bin/decotrain" train "$@"
