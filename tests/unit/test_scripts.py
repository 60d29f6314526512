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

# A Python that makes an environment of itself, and says what its pip is asked for.
MAKES = """case "$1 $2" in
--version*) echo Python 3.12.1 ;;
"-m venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
"-m pip") shift 2; [ "$*" = --version ] && [ ! -e .venv/installed-tests ] || echo pip "$@" ;;
esac"""


@pytest.fixture
def repository(tmp_path):
    """Nothing but test.sh, and requirements that need no package, in a folder with a space in its name."""
    tmp_path = tmp_path / "my folder"
    tmp_path.mkdir()
    for name in ("test.sh", "examples/environment.sh", "requirements.txt", "tests/requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith(".sh"):
            shutil.copy(ROOT / name, tmp_path / name)
        else:
            (tmp_path / name).touch()
    return tmp_path


def run(repository, command, python=sys.executable, path=""):
    return subprocess.run(command, cwd=repository, capture_output=True, text=True,
                          env={"PATH": f"{path}/usr/bin:/bin", "PYTHON": str(python)})


def write_python(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("arguments, expected", [
    ([], []), (["unit"], ["tests/unit", "-m", "not slow"]), (["runs", "-k", "a b"], ["tests/runs", "-k", "a b"]),
    (["ranks", "unit"], ["tests/ranks", "unit"]), (["tests/unit/test_data.py"], ["tests/unit/test_data.py"])])
def test_a_folder_of_tests_or_all_and_further_words_for_pytest(repository, arguments, expected):
    write_python(repository / ".venv/bin/python", 'printf "<%s>" "$@"')
    (repository / ".venv/installed-tests").touch()
    words = re.findall("<(.*?)>", run(repository, ["bash", "test.sh", *arguments]).stdout)
    assert words[words.index("pytest") + 1:] == ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *expected]


def test_an_environment_without_pip_gets_it(repository):
    """As a first run leaves it that was stopped half-way: `python3 -m venv --without-pip .venv`."""
    write_python(repository / ".venv/bin/python",
                 'case "$1 $2" in "-m pip") [ -e .venv/pip ] ;; "-m ensurepip") touch .venv/pip ;; esac')
    done = run(repository, MAKE)
    assert done.returncode == 0 and done.stdout == "Installing tests/requirements.txt (once; a few minutes)\n"
    assert run(repository, MAKE).stdout == ""


def test_an_environment_that_cannot_get_pip_is_made_anew(repository):
    write_python(repository / ".venv/bin/python", 'case "$2" in pip | ensurepip) exit 1 ;; esac')
    done = run(repository, MAKE, write_python(repository / "python", MAKES))
    assert done.returncode == 0 and "Making .venv with Python 3.12.1\npip install" in done.stdout
    assert done.stdout.endswith("pip --version\n")


def test_other_pins_are_installed_into_the_environment_that_is_there(repository):
    python = write_python(repository / "python", MAKES)
    first = run(repository, MAKE, python).stdout
    assert "Making .venv" in first and "pip install --disable-pip-version-check -r tests/requirements.txt\n" in first
    assert "--quiet" not in first  # its bar shows what is downloaded, and how much
    assert run(repository, MAKE, python).stdout == "pip --version\n"
    (repository / "requirements.txt").write_text("new==1\n")
    again = run(repository, MAKE, python).stdout
    assert "Making .venv" not in again and "pip install" in again


def test_a_stopped_installation_goes_on_in_the_next_run(repository):
    python = write_python(repository / "python", MAKES.replace("echo pip", "[ ! -e stop ] || exit 130; echo pip"))
    (repository / "stop").touch()
    assert run(repository, MAKE, python).returncode == 130
    (repository / "stop").unlink()
    again = run(repository, MAKE, python)
    assert again.returncode == 0 and "Making" not in again.stdout and "pip install" in again.stdout


def test_uv_is_used_where_it_is(repository):
    makes = "mkdir -p .venv/bin; cp python .venv/bin"
    write_python(repository / "bin/uv", f'echo "uv $*"; [ "$1" != venv ] || {{ {makes}; }}')
    done = run(repository, MAKE, write_python(repository / "python", MAKES), f"{repository}/bin:")
    assert done.returncode == 0 and "uv venv --quiet --python" in done.stdout
    assert "uv pip install --python .venv/bin/python -r tests/requirements.txt\n" in done.stdout
    assert "pip install --disable" not in done.stdout


@pytest.mark.parametrize("place", ["elsewhere/python", ".venv/bin/python"])
def test_an_old_python_is_refused_before_anything_is_made(repository, place):
    old = write_python(repository / place, 'case $1 in --version) echo Python 3.10.12 ;; *) exit 1 ;; esac')
    done = run(repository, MAKE, old)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"error: Python 3.11 or newer is needed; .+ is Python 3.10.12. .*\n", done.stderr)
    assert not (repository / ".venv/pyvenv.cfg").exists()


def test_an_environment_that_cannot_be_made_leaves_nothing(repository):
    """As on Debian without python3-venv, which makes the half without pip, says what to install, and fails."""
    half = '[ "$2" != venv ] || { mkdir -p .venv/bin; cp "$0" .venv/bin; exit 1; }'
    done = run(repository, MAKE, write_python(repository / "python", half))
    assert done.returncode == 2 and "cannot make .venv" in done.stderr and not (repository / ".venv").exists()
    assert "sudo apt install python3-venv" in done.stderr


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


def test_commands_of_the_demo_can_be_pasted():
    demo = (ROOT / "demo.sh").read_text()
    show = re.search(r"^run\(\) \{.*?^\}", demo, re.MULTILINE | re.DOTALL)[0].replace('\n    "$@"\n', "\n")
    words = ["python", "chat.py", "out/a-b", "--message", "Who are you?", "it's", "$HOME", "a*", "", "x=1"]
    shown = subprocess.run(["bash", "-c", f'{show}\nrun "$@"', "demo", *words], capture_output=True, text=True).stdout
    assert shown.startswith("\n+ python chat.py out/a-b --message 'Who are you?' ") and shown.endswith(" x=1\n")
    pasted = subprocess.run(["bash", "-c", "printf '%s\\n' " + shown.removeprefix("\n+ ")], capture_output=True,
                            text=True)
    assert pasted.stdout.split("\n")[:-1] == words


# -- the lock file and the image --------------------------------------------------------------------------------------

def test_the_lock_file_has_all_pins_and_a_hash_for_each():
    def pins(text):
        return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE))

    lock = (ROOT / "requirements.lock").read_text()
    locked = pins(lock)
    assert pins((ROOT / "requirements.txt").read_text()).items() <= locked.items(), "make requirements.lock anew"
    packages = [entry for entry in re.split(r"\n(?=\S)", lock) if not entry.startswith("#")]
    assert len(packages) >= len(locked) > 50  # some have versions of their own for an older Python
    assert all("--hash=sha256:" in entry for entry in packages)
    assert "://" not in lock


def test_the_image_holds_what_it_runs():
    """No daemon is needed to see that: what is copied is there, and what each step runs is bash without mistakes."""
    steps = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text())
    for sources in re.findall(r"^COPY (.*) \S+$", steps, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    commands = re.findall(r"^RUN (.*)$", steps, re.MULTILINE)
    for command in commands:
        assert subprocess.run(["sh", "-n", "-c", command], capture_output=True).returncode == 0
    assert len(commands) == 2
    for torch, expected in (("cpu", ["torch==2", "-r requirements.txt"]), ("cuda", ["--require-hashes"])):
        done = subprocess.run(["sh", "-ec", 'pip() { echo "pip $*"; }; ' + commands[1]], cwd=ROOT, text=True,
                              capture_output=True, env={"PATH": "/usr/bin:/bin", "TORCH": torch})
        lines = done.stdout.splitlines()
        assert len(lines) == len(expected) and all(map(str.__contains__, lines, expected)), done.stdout
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    needed = {*ROOT.glob("*.py"), *ROOT.glob("ds_config*.json"), ROOT / "mechanisms", ROOT / "finetune",
              ROOT / "requirements.lock"}
    assert needed <= {path for pattern in kept for path in ROOT.glob(pattern)}
