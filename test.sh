#!/usr/bin/env bash
# Run the whole test suite: bash test.sh [arguments of pytest]
# Makes .venv on the first run. Needs Python 3.10 or newer, no GPU and no network after the installation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source examples/environment.sh
use_environment tests/requirements.txt
exec python -m pytest "$@"
