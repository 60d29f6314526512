#!/usr/bin/env bash
# Run the whole test suite: bash test.sh [arguments of pytest]
# Makes .venv on the first run. Needs Python 3.10 or newer, no GPU and no network after the installation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source examples/environment.sh
use_environment tests/requirements.txt
# Two files of tests at a time: most of what a test waits for is one core.
exec python -m pytest -n 2 --dist loadfile "$@"
