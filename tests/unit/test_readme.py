"""README's commands are commands of these programs; its translations hold the same ones in the same places."""

import importlib
import os
import re
import shlex
import subprocess

import pytest

from mechanisms.flags import prepare_command_line
from tests.readme import LANGUAGES, ROOT, blocks

OURS = {"estimate_memory", "inspect_data"}  # take the flags of finetune.py, too


def commands():
    """The words of each command in a block for a shell."""
    text = "".join(text for language, text in blocks("README.md") if language == "bash").replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with everything that the commands name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text("{}\n")
    for name in re.findall(r"Qwen/Qwen[\w.-]+|out[\w-]*", str(commands())):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "config.json").write_text("{}")


def test_every_command_is_one_that_its_program_takes(place):
    assert len(commands()) > 10
    for program, script, *words in commands():
        assert (ROOT / script).is_file()
        if program == "python" and script.removesuffix(".py") in OURS:
            importlib.import_module(script.removesuffix(".py")).parse_arguments(words)
        elif program == "python":
            prepare_command_line(str(ROOT / script), words)
        elif "/" in script:
            done = subprocess.run(["bash", ROOT / script, *words], env={**os.environ, "DRY_RUN": "1"}, text=True,
                                  capture_output=True)
            assert done.returncode == 0, done.stderr


def outline(page):
    """What must be the same in all languages."""
    text = (ROOT / page).read_text(encoding="utf-8")
    without_code = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    comment = re.compile(r"(^|\s+)#.*", re.MULTILINE)
    return {"code": [comment.sub("", code) for language, code in blocks(page) if language],
            "headings": [len(marks) for marks in re.findall(r"^(#+) ", without_code, re.MULTILINE)],
            "rows of tables": [len(table.splitlines())
                               for table in re.findall(r"(?:^\|.*\n)+", without_code, re.MULTILINE)],
            "items": len(re.findall(r"^(?:-|\d\.) ", without_code, re.MULTILINE)),
            "links": sorted(set(re.findall(r"\]\(([^)]+)\)|src=\"(.*?)\"", without_code))
                            - {(name, "") for name in LANGUAGES})}


@pytest.mark.parametrize("page", LANGUAGES[1:])
def test_a_translation_has_the_same_commands_headings_tables_and_links(page):
    ours, theirs = outline("README.md"), outline(page)
    for name, value in ours.items():
        assert theirs[name] == value, name


def test_links_lead_somewhere():
    for page in (*LANGUAGES, "CONTRIBUTING.md", "SECURITY.md", *ROOT.glob("docs/*.md")):
        for link, image in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)|src=\"(.*?)\"", (ROOT / page).read_text("utf-8")):
            assert ((ROOT / page).parent / (link or image)).exists(), f"{page}: {link or image}"
