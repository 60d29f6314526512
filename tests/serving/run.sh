#!/usr/bin/env bash
# Other programs read every kind of result: bash tests/serving/run.sh [transformers] [ctranslate2] [vllm] [llama_cpp]
# Prints a table. Installs each program once, outside of this folder and of .venv (see readers.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/environment.sh
use_environment tests/requirements.txt
export OMP_NUM_THREADS=1
exec python -m tests.serving.readers "$@"
