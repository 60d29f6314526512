"""The command line, read and checked before anything heavy is imported.

Importing torch, transformers and peft takes about ten seconds, too long to learn of a misspelt flag, a wrong value or
a file that is not there. declarations.py knows the flags without that.

Beside what argparse knows, the metadata of a field may say:
  "exists": what its value has to name: "data", "model", "deepspeed" or "checkpoint", see `_not_there`
  "missing": it has to be given although it has a default; the text says what is asked for
  "hidden": it has no effect, and `--help` leaves it out
"""

import argparse
import difflib
import glob
import json
import math
import os
import re
import signal
import sys
from collections.abc import Iterable
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import NamedTuple

from mechanisms.config_file import CONFIG_FILE, VARIABLE, read_config
from mechanisms.declarations import METADATA, PUBLIC, TRAINER, Flag, print_help, read_flags
from mechanisms.errors import UserError
from mechanisms.hints import what_to_write
from mechanisms.paths import could_be_on_the_hub, deepspeed_file, model_folder
from mechanisms.refusals import LIMITS, NEEDS, OTHERS, REFUSED
from mechanisms.sources import data_files

# Flags of the original scripts that transformers 5 knows under another name. They are read as the new name, and said.
RENAMED = {"evaluation_strategy": "eval_strategy",
           "warmup_ratio": "warmup_steps"}  # transformers 5: a value below 1 is a share of all steps
DASHES = "-–—"  # text programs make the second and third of "--"
BOOLEANS = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")  # those of HfArgumentParser, in any case
NEXT_LINE = "\n       "  # as deep as "error: "


class Given(NamedTuple):
    """A flag as the user gave it."""

    flag: Flag | None  # None: there is none of this name
    values: list[str]
    written: str  # as it stands there: "--learning-rate"
    place: str = ""  # of a flag in a file: "run.yaml: "

    def __str__(self):
        return self.place + self.written


def prepare_command_line(script: str, argv: list[str], training: str | None = None,
                         words_too: bool = False) -> list[str]:
    """Read config files, check the names and values of all flags, answer `--help`.

    Args:
        script: path of the script whose `*Arguments` dataclasses define the flags.
        training: path of a script for training, for a script that takes all flags of that too.
        argv: the arguments after the script's name. Words that end in .yaml, .yml or .json and are not the value of a
            flag are config files: mappings of flags to values.
        words_too: whether a script with `training` takes words beside the flags. It needs none of these flags then.

    Returns:
        argv for `HfArgumentParser`: words that belong to no flag, the flags of files, those of the command line, so
        that these win. Flags have the names of their fields, choices are spelled as declared, comma lists are split.
        Prepared once more it stays the same, and nothing is printed.

    Raises:
        UserError: everything that is wrong, each with what to write.
        SystemExit: after `-h`/`--help`, with code 0.
    """
    if "-h" in argv or "--help" in argv:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends without a word, like any Unix tool
        print_help(script, training)
        sys.exit(0)
    flags, trains = _flags_by_name(script, training)
    given, words = _split(argv, flags)
    given = [Given(flags.get(_name(key)), values, key, f"{path}: ") for path in words if path.endswith(CONFIG_FILE)
             for key, values in read_config(path)] + given
    words = [word for word in words if not word.endswith(CONFIG_FILE)]

    problems = [_unknown(entry, flags, trains) for entry in given if not entry.flag]
    if trains and not words_too:  # the others may take words
        problems += [f"unexpected argument {word!r}" for word in words]
    advice = f"{NEXT_LINE}All flags: python {os.path.basename(script)} --help" if problems else ""
    given = [entry._replace(values=_as_declared(entry)) for entry in given if entry.flag]
    problems += [problem for entry in given if (problem := _wrong_values(entry))]
    last = {entry.flag.name: entry for entry in given}
    if not advice and not words_too:  # else it may be there under another name
        problems += [_missing(flag) for flag in flags.values() if flag.required and flag.name not in last]
    last = {name: entry for name, entry in last.items() if not _wrong_values(entry)}
    problems += [problem for entry in last.values() for problem in _not_there(entry)]
    if trains:
        problems += [problem for entry in last.values() for problem in _refused(entry, last, flags)]
    if problems:
        raise UserError(NEXT_LINE.join(problems) + advice)
    _say_new_names(given)
    return [model_folder(word) for word in words] + [word for entry in given for word in _as_words(entry)]


def make_parser(classes: Iterable[type]):
    """The HfArgumentParser of dataclasses whose metadata has keys of ours. It raises UserError where it would exit."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def add_argument(self, *names, **options):
            return super().add_argument(*names, **{key: value for key, value in options.items() if key not in METADATA})

        def error(self, message):
            raise UserError(message)

    return Parser(classes, allow_abbrev=False)


def parse_into(classes: Iterable[type], argv: list[str], problems: list[str] | None = None) -> tuple:
    """What `prepare_command_line` returned -> one instance of each dataclass, and the list of words beside the flags.

    Args:
        problems: gets a line for each value that a dataclass itself refuses; the instance has the default instead.

    Raises UserError: a value that a flag does not take, or a required flag that is missing; without `problems`, all
    that would be put there.
    """
    found = [] if problems is None else problems
    namespace, words = make_parser(classes).parse_known_args(argv)
    made = [_make(cls, vars(namespace), found) for cls in classes]
    if found and problems is None:
        raise UserError(NEXT_LINE.join(found))
    return *made, words


def read_values(script: str, argv: list[str]) -> argparse.Namespace:
    """What `prepare_command_line` returned -> the values of the flags that a script declares, without importing it.

    Values that are neither numbers nor True and False stay text; those that the script inherits are left out.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in [flag for group, flags in read_flags(script).items() if group != TRAINER for flag in flags]:
        if flag.nargs != 0:
            const = {"const": True} if flag.nargs == "?" else {}
            parser.add_argument(f"--{flag.name}", nargs=flag.nargs, default=flag.default, **const, type={
                "int": int, "float": float, "bool": _truth}.get(flag.type, str))
    return parser.parse_known_args(argv)[0]


def read_groups(script: str, argv: list[str], training: str) -> tuple[dict, list[str]]:
    """What `prepare_command_line` returned -> ({dataclass: SimpleNamespace of its flags' values}, words beside the
    flags): as `read_values`, but with the flags of `training`, those that it inherits too.
    """
    given, words = _split(argv, _flags_by_name(script, training)[0])
    values = {entry.flag.name: _typed(entry) for entry in given}
    return {group: SimpleNamespace(**{flag.name: values.get(flag.name, flag.default) for flag in flags})
            for group, flags in (read_flags(script) | read_flags(training)).items()}, words


def _typed(entry):
    convert = {"int": int, "float": float, "bool": _truth}.get(entry.flag.type, str)
    return list(map(convert, entry.values)) if entry.flag.nargs == "+" else convert(_value(entry))


def _truth(word):
    return word.lower() in BOOLEANS[:len(BOOLEANS) // 2]


def _make(cls, values, problems):
    """An instance of a dataclass. What it says against a value becomes a problem, and that value is left out, until
    it says nothing more: by itself it would name the first problem only."""
    defaults = {field.name: field.default_factory() if field.default_factory is not MISSING else field.default
                for field in fields(cls) if field.init}
    given = {name: values[name] for name in defaults if values[name] != defaults[name]}
    while given:
        instance, problem = _try(cls, given)
        if not problem:
            return instance
        blamed = _to_blame(cls, given, problem)
        name = f"--{PUBLIC.get(blamed, blamed)}"
        problems.append(problem if blamed is None or name in problem else f"{name}: {problem}")
        given = {} if blamed is None else _without(given, blamed)
    return cls()


def _to_blame(cls, values, problem):
    """The name of the value that a dataclass speaks of, None if it would say the same without any one of them."""
    others = {name: _try(cls, _without(values, name))[1] for name in values}  # what it says without that value
    return min((name for name in values if others[name] != problem), default=None,
               key=lambda name: (others[name] is not None, name not in problem))


def _without(values, name):
    return {other: value for other, value in values.items() if other != name}


def _try(cls, values):
    """(instance, None), or (None, what its __post_init__ says against the values)."""
    try:
        return cls(**values), None
    except (UserError, ValueError, ImportError) as error:
        return None, " ".join(str(error).split())


# -- what is given ----------------------------------------------------------------------------------------------------

def _flags_by_name(script, training):
    """({name that a user may write: Flag}, whether the flags of training are among them)"""
    groups = read_flags(script) | (read_flags(training) if training else {})
    flags = {flag.name: flag for group in groups.values() for flag in group}
    trains = TRAINER in groups
    if trains:
        flags |= {public: flags[name] for name, public in PUBLIC.items()}
        flags |= {old: flags[name] for old, name in RENAMED.items()}
    return flags, trains


def _name(written):
    """The name in "--learning-rate=1", whatever its dashes."""
    return written.partition("=")[0].lstrip(DASHES).replace("-", "_")


def _is_flag(word, flags):
    """As argparse sees it: "-1" and "-- who are you?" are values."""
    return re.fullmatch(r"--?[A-Za-z][\w-]*(=.*)?", word, re.DOTALL) or word[:1] in DASHES and _name(word) in flags


def _split(argv, flags):
    """argv -> ([Given], words that are not the value of a flag)."""
    given, words, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        if not _is_flag(word, flags):
            words.append(word)
            continue
        written, equals, value = word.partition("=")
        flag = flags.get(_name(word)) if re.match("--[^-]", word) else None  # "-data_path" is none
        values = [value] if equals else _take_values(rest, flag, flags)
        given.append(Given(flag, values, written))
    return given, words


def _take_values(rest, flag, flags):
    """Take the values of a flag off the front of `rest`."""
    most = {None: 1, "?": 1, 0: 0}.get(flag.nargs, len(rest)) if flag else len(rest)
    count = 0
    while count < min(most, len(rest)) and not _is_flag(rest[count], flags):
        if flag and flag.nargs == "?" and rest[count].endswith(CONFIG_FILE):  # `--use_lora run.yaml`
            break
        count += 1
    values, rest[:count] = rest[:count], []
    return values


def _as_declared(entry):
    """The values with comma lists split, choices in the declared case, and models of the Hub's cache found in it."""
    values = entry.values
    if entry.flag.metadata.get("exists") == "model":
        values = [model_folder(value) for value in values]
    if entry.flag.nargs == "+":
        values = [part for value in values for part in _split_at_commas(value)]
    spelling = {choice.lower(): choice for choice in entry.flag.choices}
    return [spelling.get(value.lower(), value) for value in values]


def _split_at_commas(value):
    if glob.glob(value):  # a file with a comma in its name
        return [value]
    parts = re.split(r",(?![^{}]*\})", value)  # the comma in x{1,2} is part of a regular expression
    return [part.strip() for part in parts if part.strip()] or [value]


def _as_words(entry):
    """The flag as argparse reads it."""
    name, values = f"--{entry.flag.name}", entry.values
    return [f"{name}={values[0]}"] if len(values) == 1 and values[0].startswith("-") else [name, *values]


def _say_new_names(given):
    if int(os.environ.get("RANK", 0)) == 0:
        for old in dict.fromkeys(_name(entry.written) for entry in given):
            if old in RENAMED:
                print(f"note: --{old} is read as --{RENAMED[old]}, its name in transformers 5", file=sys.stderr)


# -- what is wrong with it --------------------------------------------------------------------------------------------

def _unknown(entry, flags, trains):
    name = _name(entry.written)
    problem = f"{entry.place}unknown flag {entry.written}"
    hint = f"write --{name}" if name in flags else what_to_write(name, flags.keys(), trains)
    if hint:
        return f"{problem}: {hint}"
    shown = [name for name, flag in flags.items() if flag.shown and name not in PUBLIC]
    near = difflib.get_close_matches(name, shown, n=1)
    return problem + (f" (did you mean --{near[0]}?)" if near else "")


def _wrong_values(entry):
    """What is wrong with the number or form of a flag's values, or None."""
    flag, values = entry.flag, entry.values
    if entry.place and (unset := VARIABLE.search(" ".join(values))):
        return f"{entry}: the environment variable {unset[1]} is not set"
    if not values and flag.nargs in (None, "+"):
        return f"{entry} takes {flag.takes}, and none is given"
    if len(values) > 1 and flag.nargs != "+" or values and flag.nargs == 0:
        return f"{entry} takes {'no value' if flag.nargs == 0 else 'one value'}, not {values}"
    wrong = next((value for value in values if not _fits(flag, value)), None)
    if wrong is None:
        return None
    near = difflib.get_close_matches(wrong.lower(), flag.choices, n=1)
    return f"{entry} takes {flag.takes}, not {wrong!r}" + (f" (did you mean {near[0]}?)" if near else "")


def _fits(flag, value):
    if flag.choices:
        return value in flag.choices
    if flag.type == "bool":
        return value.lower() in BOOLEANS
    if flag.type == "dict" and not value.startswith("{"):
        return "exists" in flag.metadata or os.path.isfile(value)
    try:
        number = {"int": int, "float": float, "dict": json.loads}.get(flag.type, str)(value)
    except ValueError:
        return False
    return flag.type != "float" or math.isfinite(number)


def _refused(entry, last, flags):
    """Lines: why the value of a flag is refused, by the tables of refusals.py.

    last: {name of a flag: the entry that counts}, of values that the flags take.
    """
    name, value, problems = entry.flag.name, _value(entry), []
    if entry.flag.nargs == 0:  # --no_x is --x False
        name = name.removeprefix("no_")
    plain = _is_default(flags[name], value)
    for row in REFUSED:
        refused = value in row.values or row.values == OTHERS and not plain
        beside = not row.beside or any(_is_given(other, last, flags) for other in row.beside)
        if name in row.flags.split() and refused and beside:
            problems.append(f"{entry} {value}: {row.why}" if row.values else f"{entry}: {row.why}")
    for fits, words, limit, names in LIMITS:
        if name in names.split() and not plain and not fits(float(value), limit):
            problems.append(f"{entry} {value}: {words} {limit:,}")
    if name in NEEDS and not plain and not any(_is_given(other, last, flags) for other in NEEDS[name]):
        problems.append(f"{entry} has no effect without {' or '.join(NEEDS[name])}")
    return problems


def _value(entry):
    """The value as one word, as it is declared."""
    if entry.flag.nargs == 0:
        return "False"
    value = " ".join(entry.values) or ("True" if entry.flag.nargs == "?" else "")
    return str(_truth(value)) if entry.flag.type == "bool" else value


def _is_default(flag, value):
    if flag.default is not None and flag.type in ("int", "float"):
        return float(value) == flag.default
    return value == str(flag.default)


def _is_given(words, last, flags):
    """Whether a flag has the value that `words` name, or any but its default."""
    name, _, wanted = words.removeprefix("--").partition(" ")
    flag = flags[name]
    value = _value(last[flag.name]) if flag.name in last else str(flag.default)
    return value == wanted if wanted else not _is_default(flag, value)


def _missing(flag):
    question = flag.metadata.get("missing")
    return f"--{flag.public} is missing" + (f": {question}" if question else "")


def _not_there(entry):
    """Lines: which data, model or file that a flag names is not there."""
    kind = entry.flag.metadata.get("exists")
    if kind == "data":
        return [f"{entry}: {problem}" for problem in data_files(entry.values)[1]]
    value = "".join(entry.values)
    if kind == "deepspeed":
        try:
            deepspeed_file(value)
        except UserError as error:
            return [f"{entry.place}{error}"]
    if value and (kind == "model" and not os.path.isdir(value) and not could_be_on_the_hub(value)
                  or kind == "checkpoint" and not os.path.isdir(value) and value.lower() not in ("true", "false")):
        return [f"{entry} {value}: no such folder"]
    return []
