"""Files stand on floors and import downwards only; the maps in CONTRIBUTING.md show what is there."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("Ground", "Data", "Model", "Run", "Programs")
HEAVY = ("torch", "transformers")


def read_map():
    """The tables of CONTRIBUTING.md -> {file: (floor, files of tests)}."""
    found, floor = {}, None
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            floor = line.lstrip("# ")
        row = re.fullmatch(r"\| `(\S+\.py)` \| (.*) \|", line)
        if row:
            assert row[1] not in found, f"{row[1]} stands twice in CONTRIBUTING.md"
            found[row[1]] = floor, re.findall("`(.*?)`", row[2])
    return found


def read_tree():
    """The files and folders of the tree in CONTRIBUTING.md."""
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Files\n\n```\n")[2].partition("```")[0]
    paths, parents = [], {0: ""}
    for indent, name in re.findall(r"^( *)(\S+)  +\S", tree, re.MULTILINE):
        paths.append(parents[len(indent)] + name)
        if name.endswith("/"):
            parents[len(indent) + 2] = paths[-1]
    return paths


MAP = read_map()


def files(*patterns):
    return {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)
            if path.name != "__init__.py"}


def imports_of(source):
    """The files of this project that a Python source imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: modules are named in full"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {file for name in names if (ROOT / (file := name.replace(".", "/") + ".py")).is_file()}


def forbidden(file, imported):
    """Why a file must not import another one of this project; None: it may."""
    if imported not in MAP:
        return f"{file} imports {imported}, which stands on no floor"
    if MAP[imported][0] == "Programs":
        return f"{file} imports the program {imported}"
    if FLOORS.index(MAP[imported][0]) > FLOORS.index(MAP[file][0]):
        return f"{file} ({MAP[file][0]}) imports {imported} ({MAP[imported][0]})"


def test_every_file_has_a_floor_and_tests():
    assert MAP.keys() == files("*.py", "mechanisms/**/*.py")
    for file, (floor, tests) in MAP.items():
        assert floor in FLOORS and tests and set(tests) <= files("tests/*/test_*.py"), file
        assert (floor == "Programs", floor == "Data") == ("/" not in file, "/data/" in file), file


def test_every_file_has_a_line_in_the_tree():
    tree = read_tree()
    assert len(tree) == len(set(tree)) and all((ROOT / path).exists() for path in tree)
    assert set(tree) >= files("*.py", "*.sh", "ds_config*.json", "finetune/*.sh", "examples/*.py", "examples/*.sh",
                              "bench/*.py", "mechanisms/**/*.py")


def test_imports_go_downwards():
    found = [(file, imported) for file in sorted(MAP) for imported in imports_of((ROOT / file).read_text("utf-8"))]
    assert ("finetune.py", "mechanisms/data/datasets.py") in found
    wrong = [reason for pair in found if (reason := forbidden(*pair))]
    assert not wrong, "\n".join(wrong)


def test_imports_that_go_elsewhere_are_seen():
    source = ("import torch, mechanisms.quiet\nfrom mechanisms import console, flags\n"
              "def later():\n    from mechanisms.data.records import Place\n    import chat")
    assert imports_of(source) == {"mechanisms/quiet.py", "mechanisms/console.py", "mechanisms/flags.py",
                                  "mechanisms/data/records.py", "chat.py"}
    assert forbidden("mechanisms/loading.py", "mechanisms/checkpoints.py") == \
        "mechanisms/loading.py (Model) imports mechanisms/checkpoints.py (Run)"
    for pair in (("mechanisms/console.py", "mechanisms/data/records.py"), ("mechanisms/loading.py", "finetune.py"),
                 ("merge_lora.py", "chat.py"), ("chat.py", "bench/worker.py")):
        assert forbidden(*pair), pair
    assert not forbidden("chat.py", "mechanisms/flags.py")
    assert not forbidden("mechanisms/loading.py", "mechanisms/qwen1.py")


@pytest.mark.parametrize("floor", ["Ground", "Data"])
def test_the_lower_floors_import_nothing_heavy(floor):
    modules = [file.removesuffix(".py").replace("/", ".") for file, (on, _) in MAP.items() if on == floor]
    code = f"""
import importlib, json, sys, time
found = {{}}
for module in {modules}:
    importlib.import_module(module)
    found[module] = [name for name in {HEAVY} if name in sys.modules]
print(json.dumps([found, time.process_time()]))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, seconds = json.loads(done.stdout)
    assert found == {module: [] for module in modules}  # the first one with something in it is the one to look at
    assert seconds < 1.5
