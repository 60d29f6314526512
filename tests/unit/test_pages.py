"""What the pages say of the code is so."""

import re

import pytest

import finetune
from mechanisms.declarations import PUBLIC, read_flags
from tests.pages import DOCS, PAGES, flags

ROOT = DOCS.parent
TESTS = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*/test_*.py"))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_made_of_the_code_is_what_it_says(name):
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](), "python -m tests.sweep docs"


def test_every_flag_has_its_row():
    page = flags()
    for group in read_flags(finetune.__file__).values():
        for flag in group:
            assert flag.name.startswith("no_") or f"`--{PUBLIC.get(flag.name, flag.name)}`" in page


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/from_qwen.md"])
def test_tests_that_a_page_names_exist(page):
    names = re.findall(r"`(test_\w+|tests/\S+)`", (ROOT / page).read_text(encoding="utf-8"))
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).is_file() if "/" in name else f"def {name}(" in TESTS


def test_every_step_from_qwen_is_shown_by_a_test():
    rows = re.findall(r"^\| (?!step |---).*$", (DOCS / "from_qwen.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 30
    assert [row for row in rows if not row.endswith("` |")] == [row for row in rows if "advised against" in row]
