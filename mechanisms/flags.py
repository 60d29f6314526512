"""The command line, read before anything heavy is imported.

Importing torch, transformers and peft takes about ten seconds, too long to learn of a misspelt flag or to read
`--help`. The flags are dataclass fields, so their names, defaults and help texts can be read from the source of the
script, and of `transformers.TrainingArguments` if they inherit from it, without running either.
"""

import ast
import difflib
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import textwrap

from mechanisms.errors import UserError

# Flags of the original scripts that transformers 5 knows under another name. They are read as the new name, and said.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps",  # transformers 5: a value below 1 is a share of all steps
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
QUIETLY = ("gradient_checkpointing", "gradient_checkpointing_kwargs")  # the name everybody still uses: not worth a line


def prepare_command_line(script, argv):
    """Expand a config file, check every flag's name, answer `--help`.

    Args:
        script: path of the script whose `*Arguments` dataclasses define the flags.
        argv: the arguments after the script's name; the first may be a .yaml, .yml or .json file of flags.

    Returns:
        argv for `HfArgumentParser`: the file's flags first, so that those of the command line win, under the names
        that transformers 5 knows.

    Raises:
        UserError: unknown flags (all of them, each with the nearest known one), or a config file that can't be read.
        SystemExit: after `-h`/`--help`, with code 0.
    """
    groups = _read_flags(script)
    known = {flag for fields in groups.values() for flag in fields}
    renamed = RENAMED if "transformers" in groups else {}
    known |= {f"no_{flag}" for flag in known} | set(renamed)
    if "-h" in argv or "--help" in argv:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends without a word, like any Unix tool
        _print_help(ast.get_docstring(ast.parse(_source(script))), groups)
        sys.exit(0)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        argv = _flags_of_file(argv[0], known) + argv[1:]

    prepared, problems = [], []
    for word in argv:
        name, equals, value = word[2:].partition("=")
        if not word.startswith("--") or not re.fullmatch(r"[\w-]+", name):  # "--message '-- who are you?'" has one flag
            prepared.append(word)
            continue
        name = name.replace("-", "_")
        if name not in known:
            problems.append(_unknown(f"--{name}", known))
        new_name = renamed.get(name, name)
        if new_name != name and name not in QUIETLY and int(os.environ.get("RANK", 0)) == 0:
            print(f"note: --{name} is read as --{new_name}, its name in transformers 5", file=sys.stderr)
        prepared.append(f"--{new_name}{equals}{value}")
    if problems:
        raise UserError("\n       ".join(problems) + f"\n       All flags: python {os.path.basename(script)} --help")
    return prepared


def parse_into(classes, argv):
    """What `prepare_command_line` returned -> one instance of each dataclass, and the list of words beside the flags.

    Raises UserError: a value that a flag does not take, or a required flag that is missing.
    """
    from transformers import HfArgumentParser

    def refuse(message):
        raise UserError(message)

    parser = HfArgumentParser(classes, allow_abbrev=False)
    parser.error = refuse
    return parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)


def _unknown(flag, known):
    near = difflib.get_close_matches(flag.lstrip("-"), known, n=1)
    return f"unknown flag {flag}" + (f" (did you mean --{near[0]}?)" if near else "")


def _source(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def _read_flags(script):
    """{class name: {flag: (default as source text, help)}} of the script's dataclasses.

    If one of them inherits from TrainingArguments, the flags of that are under "transformers".
    """
    classes = _arguments_classes(script)
    groups = {node.name: _fields(node) for node in classes}
    if any("TrainingArguments" in ast.unparse(base) for node in classes for base in node.bases):
        transformers_folder = os.path.dirname(importlib.util.find_spec("transformers").origin)
        for node in _arguments_classes(os.path.join(transformers_folder, "training_args.py")):
            groups["transformers"] = _fields(node)
    return groups


def _arguments_classes(path):
    return [node for node in ast.parse(_source(path)).body
            if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments")]


def _fields(node):
    return {statement.target.id: _default_and_help(statement.value) for statement in node.body
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)}


def _default_and_help(value):
    if not (isinstance(value, ast.Call) and getattr(value.func, "id", "") == "field"):
        return (ast.unparse(value) if value else "required"), ""
    keywords = {keyword.arg: keyword.value for keyword in value.keywords}
    metadata = keywords.get("metadata")
    # Only the texts are wanted; other entries of the metadata (nargs, choices) may be any expression.
    texts = {
        key.value: entry.value
        for key, entry in zip(metadata.keys, metadata.values) if isinstance(entry, ast.Constant)
    } if isinstance(metadata, ast.Dict) else {}
    default = "none" if "default_factory" in keywords else "required"
    if "default" in keywords:
        default = ast.unparse(keywords["default"])
    return default, texts.get("help", "")


def _print_help(docstring, groups):
    width = min(shutil.get_terminal_size().columns, 110)
    print(docstring)
    others = set(groups.pop("transformers", ()))
    for group, flags in groups.items():
        print(f"\n{group.removesuffix('Arguments')}:")
        for flag, (default, text) in flags.items():
            print(f"  --{flag}")
            text = f"{text} ({default if default == 'required' else f'default: {default}'})".strip()
            print(textwrap.fill(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8))
    others -= {flag for flags in groups.values() for flag in flags}
    if others:
        print("\nEvery other flag of transformers.TrainingArguments works as well:")
        print(textwrap.fill(", ".join(sorted(others)), width, initial_indent="  ", subsequent_indent="  "))


def _flags_of_file(path, known):
    """The flags of a YAML or JSON mapping as command-line words.

    Scalars are kept as they are written: YAML would turn `eval_strategy: no` into False and leave `1e-5` a string.
    """
    try:
        if path.endswith(".json"):
            typed = json.loads(_source(path))
            written = json.loads(_source(path), parse_int=str, parse_float=str, parse_constant=str)
        else:
            import yaml

            typed, written = yaml.safe_load(_source(path)), yaml.load(_source(path), yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    except Exception as error:  # yaml.YAMLError, named so only where yaml is imported
        if type(error).__module__.startswith("yaml"):
            raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
        raise
    if not isinstance(typed, dict):
        raise UserError(f"{path}: a config file is a mapping of flag names to values")
    unknown = [_unknown(key, known) for key in map(str, typed) if key.lstrip("-") not in known]
    if unknown:
        raise UserError(f"{path}: " + f"\n       {path}: ".join(unknown))
    words = []
    for (key, value), text in zip(typed.items(), written.values()):
        if value is None:
            continue
        words.append(f"--{key}")
        if isinstance(value, dict):
            words.append(json.dumps(value))
        elif isinstance(value, list):
            words += [str(entry) for entry in text]
        else:
            words.append(str(text))
    return words
