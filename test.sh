#!/usr/bin/env bash
# The tests: bash test.sh [unit | runs | ranks] [arguments of pytest]
# All of them, or one folder of tests/: unit in under a minute, runs (one process trains), ranks (several do).
# Makes .venv on the first run. Needs Python 3.11 or newer, no GPU and no network after the installation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source examples/environment.sh
use_environment tests/requirements.txt
case ${1-} in
unit) set -- tests/unit -m "not slow" "${@:2}" ;;
runs | ranks) set -- "tests/$1" "${@:2}" ;;
esac
# Two files of tests at a time: most of what a test waits for is one core. Those that take minutes come first, in the
# order of the folders, and not last because they hold few tests.
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
