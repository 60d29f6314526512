# shellcheck shell=bash
# Sourced by demo.sh, test.sh and .ci/run. use_environment FILE: a virtual environment in .venv with the packages of a
# requirements file, made on the first run and reused until the pins change. Stopped half-way (Ctrl-C), the next run
# goes on: what was downloaded whole is not downloaded again. With uv, where that is installed; else with pip.

use_environment() {
    local requirements=$1 stamp
    if [ -x .venv/bin/python ]; then check_version .venv/bin/python; else make_environment; fi
    stamp=.venv/installed-$(basename "$(dirname "$PWD/$requirements")")
    if ! cat requirements.txt "$requirements" | cmp -s - "$stamp"; then
        echo "Installing $requirements (once; a few minutes)"
        if command -v uv > /dev/null; then
            uv pip install --python .venv/bin/python -r "$requirements"
        else
            # Without pip it was made by another tool, or its making was stopped half-way.
            .venv/bin/python -m pip --version > /dev/null 2>&1 || .venv/bin/python -m ensurepip > /dev/null 2>&1 ||
                make_environment
            .venv/bin/python -m pip install --disable-pip-version-check -r "$requirements"
        fi
        cat requirements.txt "$requirements" > "$stamp"
    fi
    PATH=$PWD/.venv/bin:$PATH
    export PATH
}

make_environment() {
    local python=${PYTHON:-python3}
    check_version "$python"
    echo "Making .venv with $("$python" --version)"
    if command -v uv > /dev/null; then
        rm -rf .venv
        uv venv --quiet --python "$python" .venv || stop "uv cannot make .venv"
    elif ! "$python" -m venv --clear .venv; then
        rm -rf .venv
        stop "$python cannot make .venv. On Debian and Ubuntu that needs a package: sudo apt install python3-venv"
    fi
}

check_version() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        stop "Python 3.11 or newer is needed; $1 is $("$1" --version 2>&1)." \
            "Set PYTHON=..., and delete .venv if there is one"
}

stop() {
    echo "error: $*" >&2
    exit 2
}
