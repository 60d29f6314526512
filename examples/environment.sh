# shellcheck shell=bash
# Sourced by demo.sh, test.sh and .ci/run. use_environment FILE: a virtual environment in .venv with the packages of a
# requirements file, made on the first run and reused until the pins change.

use_environment() {
    local requirements=$1 python=${PYTHON:-python3} stamp
    [ ! -x .venv/bin/python ] || python=.venv/bin/python
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        stop "Python 3.11 or newer is needed; $python is $("$python" --version 2>&1)." \
            "Set PYTHON=..., and delete .venv if there is one"
    fi
    if [ ! -x .venv/bin/python ]; then
        echo "Making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv || { rm -rf .venv; stop "$python cannot make .venv"; }
    fi
    stamp=.venv/installed-$(basename "$(dirname "$PWD/$requirements")")
    if ! cat requirements.txt "$requirements" | cmp -s - "$stamp"; then
        echo "Installing $requirements (once; a few minutes)"
        if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then # made by another tool, or stopped half-way
            .venv/bin/python -m ensurepip > /dev/null || stop ".venv has no pip and cannot get it: delete .venv"
        fi
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        cat requirements.txt "$requirements" > "$stamp"
    fi
    PATH=$PWD/.venv/bin:$PATH
    export PATH
}

stop() {
    echo "error: $*" >&2
    exit 2
}
