"""test.sh and its environment, and the checks before a commit: what they run. No package is downloaded here."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MAKE = ["bash", "-euc", """source examples/environment.sh
use_environment tests/requirements.txt
python -m pip --version"""]


@pytest.fixture
def repository(tmp_path):
    """Nothing but test.sh, and requirements that need no package."""
    for name in ("test.sh", "examples/environment.sh", "requirements.txt", "tests/requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith(".sh"):
            shutil.copy(ROOT / name, tmp_path / name)
        else:
            (tmp_path / name).touch()
    return tmp_path


def run(repository, command, python=sys.executable):
    return subprocess.run(command, cwd=repository, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)})


def write_python(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("arguments, expected", [
    ([], []), (["unit"], ["tests/unit"]), (["runs", "-k", "a b"], ["tests/runs", "-k", "a b"]),
    (["ranks", "unit"], ["tests/ranks", "unit"]), (["tests/unit/test_data.py"], ["tests/unit/test_data.py"])])
def test_a_folder_of_tests_or_all_and_further_words_for_pytest(repository, arguments, expected):
    write_python(repository / ".venv/bin/python", 'printf "<%s>" "$@"')
    (repository / ".venv/installed-tests").touch()
    words = re.findall("<(.*?)>", run(repository, ["bash", "test.sh", *arguments]).stdout)
    assert words[words.index("pytest") + 1:] == ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *expected]


@pytest.mark.parametrize("ensurepip, code", [("touch .venv/pip", 0), ("false", 2)])
def test_an_environment_without_pip_gets_it(repository, ensurepip, code):
    """As a first run leaves it that was stopped half-way: `python3 -m venv --without-pip .venv`."""
    write_python(repository / ".venv/bin/python",
                 f'case "$1 $2" in "-m pip") [ -e .venv/pip ] ;; "-m ensurepip") {ensurepip} ;; esac')
    done = run(repository, MAKE)
    assert done.returncode == code and done.stdout == "Installing tests/requirements.txt (once; a few minutes)\n"
    assert ("delete .venv" in done.stderr) == (code == 2)
    assert run(repository, MAKE).stdout == ("" if code == 0 else done.stdout)


@pytest.mark.parametrize("place", ["elsewhere/python", ".venv/bin/python"])
def test_an_old_python_is_refused_before_anything_is_made(repository, place):
    old = write_python(repository / place, 'case $1 in --version) echo Python 3.10.12 ;; *) exit 1 ;; esac')
    done = run(repository, MAKE, old)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"error: Python 3.11 or newer is needed; \S+ is Python 3.10.12. .*\n", done.stderr)
    assert not (repository / ".venv/pyvenv.cfg").exists()


def test_an_environment_that_cannot_be_made_leaves_nothing(repository):
    """As on Debian without python3-venv, which makes the half without pip, says what to install, and fails."""
    half = '[ "$2" != venv ] || { mkdir -p .venv/bin; cp "$0" .venv/bin; exit 1; }'
    done = run(repository, MAKE, write_python(repository / "python", half))
    assert done.returncode == 2 and "cannot make .venv" in done.stderr and not (repository / ".venv").exists()


def test_ci_and_pre_commit_run_the_same_checks_by_the_pinned_tools():
    ci = (ROOT / ".ci/run").read_text()
    pinned = (ROOT / "tests/requirements.txt").read_text()
    [local] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local" and {hook["id"] for hook in local["hooks"]} == {"ruff", "shellcheck"}
    for hook in local["hooks"]:
        command = hook["entry"].removeprefix(".venv/bin/")
        assert hook["entry"] != command and re.search(f"^{command}", ci, re.MULTILINE)
        assert re.search(rf"^{hook['id']}(-py)?==\d[\d.]*$", pinned, re.MULTILINE)
    patterns = re.search("^shellcheck -x .ci/run (.*)$", ci, re.MULTILINE)[1].split()
    checked = {script for pattern in patterns for script in ROOT.glob(pattern)}
    assert checked == {*ROOT.glob("*.sh"), *ROOT.glob("[!.]*/**/*.sh")}
