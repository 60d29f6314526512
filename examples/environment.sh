# shellcheck shell=bash
# Sourced by demo.sh and test.sh. use_environment FILE: a virtual environment in .venv with the packages of a
# requirements file, made on the first run and reused until the pins change.

use_environment() {
    local requirements=$1 stamp
    if [ ! -x .venv/bin/python ]; then
        local python=${PYTHON:-python3}
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
            echo "error: Python 3.10 or newer is needed; '$python' is $("$python" --version 2>&1). Set PYTHON=..." >&2
            exit 1
        fi
        echo "Making .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    stamp=.venv/installed-$(basename "$(dirname "$PWD/$requirements")")
    if ! cat requirements.txt "$requirements" | cmp -s - "$stamp"; then
        echo "Installing $requirements (once; a few minutes)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        cat requirements.txt "$requirements" > "$stamp"
    fi
    PATH=$PWD/.venv/bin:$PATH
    export PATH
}
