"""docs/flags.md: every flag of finetune.py, made of what the code says. `python -m tests.sweep docs` writes it."""

import dataclasses
import re
from pathlib import Path

import transformers

import finetune
from mechanisms.declarations import TRAINER, read_flags
from mechanisms.refusals import LIMITS, NEEDS, OTHERS, REFUSED, never_taken

PAGE = Path(finetune.__file__).parent / "docs" / "flags.md"
DEFAULTS = {field.name: field.default for field in dataclasses.fields(transformers.TrainingArguments)}
LONGEST = 200  # characters of transformers' help, whole sentences of them
HEAD = """# The flags of finetune.py

Made by `python -m tests.sweep docs` from the code; a test compares. `python finetune.py --help` shows the first part.
What is said under "takes" is checked before anything is loaded; what does not fit is refused with the flag's name.
`python -m tests.sweep flags` runs every flag of `transformers.TrainingArguments` with another value than its default,
and looks for its effect or its refusal.
"""
REFUSED_HEAD = """
## Refused

These flags of `transformers.TrainingArguments` take no value but their default: here they would do nothing, or
something else than they say.
"""
VALUES_HEAD = """
## Values that are refused

Of flags that work with others.
"""


def page() -> str:
    parts = [HEAD]
    never = never_taken()
    for group, flags in read_flags(finetune.__file__).items():
        title = "Of transformers.TrainingArguments" if group == TRAINER else group.removesuffix("Arguments")
        parts.append(f"\n## {title}\n")
        parts.append(_table(("flag", "default", "what it does", "takes"), [
            (f"`--{flag.public}`", _default(flag), _help(flag), "; ".join(_takes(flag)))
            for flag in flags if flag.nargs != 0 and flag.name not in never]))
    parts.append(REFUSED_HEAD)
    parts.append(_table(("flag", "why, and what to do"), [
        (_names(row), row.why) for row in REFUSED if row.values == OTHERS]))
    parts.append(VALUES_HEAD)
    parts.append(_table(("flag", "values", "why, and what to do"), [
        (_names(row), ", ".join(f"`{value}`" for value in row.values), row.why)
        for row in REFUSED if row.values != OTHERS]))
    return "".join(parts)


def _names(row):
    return ", ".join(f"`--{name}`" for name in row.flags.split())


def _default(flag):
    if flag.required:
        return "required"
    default = DEFAULTS.get(flag.name) if flag.default is None else flag.default  # some are computed
    return "" if default in (None, "", dataclasses.MISSING) else f"`{default}`"


def _help(flag):
    text = " ".join(flag.metadata.get("help", "").split()).replace("%%", "%")
    if len(text) > LONGEST:
        text = re.match(rf"(.{{,{LONGEST}}}\.)(?= )|[^.]*", text)[0]
    return text


def _takes(flag):
    """What its values have to be, and what it needs beside it."""
    refused = {value for row in REFUSED if flag.name in row.flags.split() for value in row.values}
    choices = [f"`{choice}`" for choice in flag.choices if choice not in refused]
    yield ", ".join(choices) or flag.metadata.get("metavar") or (flag.takes if flag.type != "str" else "text")
    for _, words, limit, names in LIMITS:
        if flag.name in names.split():
            yield f"{words} {limit:,}"
    if flag.name in NEEDS:
        yield "with " + " or ".join(f"`{words}`" for words in NEEDS[flag.name])


def _table(head, rows):
    cells = [head, ["---"] * len(head), *rows]
    return "\n" + "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in cells)
