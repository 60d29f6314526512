"""The flags of a script, read from its source: the fields of its dataclasses, and the text of `--help` made of them.

Nothing of the script runs, so that torch and transformers need not be imported, which takes about ten seconds.
"""

import ast
import contextlib
import functools
import importlib.util
import os
import re
import shutil
import sys
import textwrap
from typing import NamedTuple

from mechanisms.errors import UserError
from mechanisms.refusals import never_taken

# Fields that are shown under the name everybody still uses; transformers will drop the old one in its version 6.
PUBLIC = {"activation_checkpointing": "gradient_checkpointing",
          "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs"}
TRAINER = "transformers"  # the group of the flags that a training script inherits
METADATA = ("exists", "missing", "hidden")  # keys of a field's metadata that argparse does not know, see flags.py
TYPES = {"int": ("INT", "a whole number"), "float": ("FLOAT", "a number"), "bool": ("True|False", "True or False"),
         "dict": ("JSON", 'JSON such as {"key": 1}')}
TEXT = "TEXT", "a value"
OTHERS_WORK = "These flags of transformers.TrainingArguments work as well (docs/flags.md describes all):"
OTHERS_REFUSED = "These take no value but their default; any other is refused with the reason, see docs/flags.md:"


class Flag(NamedTuple):
    """A flag, as HfArgumentParser makes it of a field."""

    name: str  # of the field
    type: str = "str"  # of one value
    choices: tuple = ()  # the values it takes, where it does not take any of its type
    nargs: str | int | None = None  # of argparse: None one value, "?" one or none, "+" one or more, 0 none
    default: object = None  # None too where it has to be given, or is made by a function
    required: bool = False
    metadata: dict = {}

    @property
    def public(self):
        return PUBLIC.get(self.name, self.name)

    @property
    def shown(self):
        return self.nargs != 0 and not self.metadata.get("hidden")

    @property
    def takes(self):
        """What its value is, in words."""
        *others, last = self.choices or [TYPES.get(self.type, TEXT)[1]]
        return f"{', '.join(others)} or {last}" if others else last


@functools.cache
def read_flags(script: str) -> dict[str, list[Flag]]:
    """{class name: [Flag]} of the script's `*Arguments` dataclasses.

    If one of them inherits from transformers.TrainingArguments, the other flags of that are under TRAINER. UserError if
    transformers is not installed then.
    """
    classes = _arguments_classes(_parsed(script))
    if not any("TrainingArguments" in ast.unparse(base) for node in classes for base in node.bases):
        return {node.name: _flags(node, {}) for node in classes}
    spec = importlib.util.find_spec("transformers")
    if spec is None:
        raise UserError(f"transformers is not installed for {sys.executable}: source .venv/bin/activate, or "
                        "pip install -r requirements.txt")
    folder = os.path.dirname(spec.origin)
    source = _parsed(os.path.join(folder, "training_args.py"))
    enums = _enums(source)
    for node in source.body:
        if isinstance(node, ast.ImportFrom) and os.path.isfile(neighbour := os.path.join(folder, f"{node.module}.py")):
            enums |= _enums(_parsed(neighbour))
    groups = {node.name: _flags(node, enums) for node in classes}
    declared = {flag.name for flags in groups.values() for flag in flags} | set(PUBLIC.values())
    groups[TRAINER] = [flag for node in _arguments_classes(source) for flag in _flags(node, enums)
                       if flag.name.removeprefix("no_") not in declared]
    return groups


def read_docstring(script: str) -> str:
    return ast.get_docstring(_parsed(script))


def _parsed(path):
    with open(path, encoding="utf-8") as file:
        return ast.parse(file.read())


def _arguments_classes(source):
    return [node for node in source.body if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments")]


def _enums(source):
    """{name: values} of the enums that a module defines."""
    return {node.name: tuple(statement.value.value for statement in node.body if isinstance(statement, ast.Assign))
            for node in source.body if isinstance(node, ast.ClassDef)
            and any(ast.unparse(base).endswith("Enum") for base in node.bases)}


def _flags(node, enums):
    """The flags of a dataclass, with --no_x for each x that is True by itself."""
    flags = [_flag(statement, enums) for statement in node.body
             if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)]
    return flags + [Flag(f"no_{flag.name}", nargs=0) for flag in flags if flag.type == "bool" and flag.default is True]


def _flag(statement, enums):
    keywords = {}
    if isinstance(statement.value, ast.Call) and ast.unparse(statement.value.func) == "field":
        keywords = {keyword.arg: keyword.value for keyword in statement.value.keywords}
    elif statement.value:
        keywords = {"default": statement.value}
    metadata = keywords.get("metadata", ast.Dict([], []))
    metadata = {_literal(key): _literal(value) for key, value in zip(metadata.keys, metadata.values)}
    default = _literal(keywords.get("default"))
    kind, optional = _type(statement.annotation)
    if "dict" in ast.unparse(statement.annotation):
        kind = "dict"
    nargs = metadata.get("nargs")
    if match := re.fullmatch(r"list\[(.+)\]", kind):
        kind, nargs = match[1], "+"
    elif kind == "bool" and not (optional and default is None):
        nargs = "?"
    choices = metadata.get("choices") or enums.get(kind.rpartition(".")[2]) or ()
    if match := re.fullmatch(r"Literal\[(.+)\]", kind):
        choices = ast.literal_eval(f"({match[1]},)")
    required = "missing" in metadata or not keywords.keys() & {"default", "default_factory"}
    return Flag(statement.target.id, kind, tuple(choices), nargs, default, required, metadata)


def _type(annotation):
    """(type of a value as source text, whether None is one too), by the rules of HfArgumentParser for `a | b | ...`."""
    kinds = [kind.strip() for kind in ast.unparse(annotation).split(" | ")]
    optional = "None" in kinds
    kinds = [kind for kind in kinds if kind != "None"]
    if len(kinds) > 1:
        kinds = ["str"] if optional else [kind for kind in kinds if kind != "str"]
    return kinds[0], optional


def _literal(node):
    """The value of an expression, None if it is not a literal."""
    with contextlib.suppress(ValueError):
        return ast.literal_eval(node) if node else None


# -- help -------------------------------------------------------------------------------------------------------------

def print_help(script: str, training: str | None = None):
    """The script's docstring, then its flags by dataclass, at most as wide as the terminal (80 without one).

    training: a script for training whose flags it takes too. Those of the model and the data are shown.
    """
    width = min(shutil.get_terminal_size().columns, 110)
    print(_narrow(read_docstring(script), width))
    groups, others = read_flags(script), []
    if training:
        groups = groups | {group: read_flags(training)[group] for group in ("ModelArguments", "DataArguments")}
    for group, flags in groups.items():
        if group == TRAINER:
            others = sorted(flag.public for flag in flags if flag.shown)
            continue
        print(f"\n{group.removesuffix('Arguments')}:")
        for flag in flags:
            if flag.shown:
                print(*_described(flag, width), sep="\n")
    refused = never_taken()
    for head, names in ((OTHERS_WORK, [name for name in others if name not in refused]),
                        (OTHERS_REFUSED, [name for name in others if name in refused])):
        if names:
            print("\n" + textwrap.fill(head, width))
            print(textwrap.fill(", ".join(names), width, initial_indent="  ", subsequent_indent="  "))


def _described(flag, width):
    """Lines: the flag with the shape of its value, then what it does and its default."""
    shape = flag.metadata.get("metavar") or "|".join(flag.choices) or TYPES.get(flag.type, TEXT)[0]
    shape = {"?": f"[{shape}]", "+": f"{shape} ..."}.get(flag.nargs, shape)
    text = flag.metadata.get("help", "")
    if len(f"  --{flag.public} {shape}") > width:
        shape, text = "NAME", f"{text} One of {', '.join(flag.choices)}."
    if flag.required:
        text += " (required)"
    elif flag.default not in (None, ""):
        text += f" (default: {flag.default})"
    indent = " " * 8
    return [f"  --{flag.public} {shape}", *textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)]


def _narrow(docstring, width):
    """The text in lines of at most `width`; what is indented are commands, each on lines of its own."""
    paragraphs = []
    for paragraph in docstring.split("\n\n"):
        if paragraph.startswith(" "):
            lines = [_narrow_command(line, width) if len(line) > width else line for line in paragraph.split("\n")]
            paragraphs.append("\n".join(lines))
        else:
            paragraphs.append(textwrap.fill(paragraph, width, break_on_hyphens=False))
    return "\n\n".join(paragraphs)


def _narrow_command(line, width):
    """A command with its comment above it, broken in front of flags."""
    command, mark, comment = line.partition("  # ")
    joined = re.sub(r"(?<=\S) +(?!-)", "\0", command.rstrip())
    lines = textwrap.wrap(joined, width - 2, subsequent_indent=" " * 6, break_on_hyphens=False)
    return (f"  # {comment}\n" if mark else "") + " \\\n".join(lines).replace("\0", " ")
