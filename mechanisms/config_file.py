"""A YAML or JSON file of flags: a mapping of their names to values, in which ${NAME} is an environment variable."""

import json
import os
import re

from mechanisms.errors import UserError

CONFIG_FILE = (".yaml", ".yml", ".json")  # how the name of one ends
VARIABLE = re.compile(r"\$\{(\w+)\}")


def read_config(path: str) -> list[tuple[str, list[str]]]:
    """[(key, values as words of a command line)]; keys without a value are left out. Raises UserError.

    Values stay as they are written: YAML would turn `eval_strategy: no` into False and leave `1e-5` a string. Variables
    that are not set stay too.
    """
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8") from error
    typed, written = (_parse_json if path.endswith(".json") else _parse_yaml)(path, source)
    if not isinstance(typed, dict):
        raise UserError(f"{path}: a config file is a mapping of flag names to values")
    return [(key, _words(value, text)) for (key, text), value in zip(written.items(), typed.values())
            if value is not None]


def _parse_json(path, source):
    """(what the source says, the same with all numbers as they are written)"""
    try:
        return json.loads(source), json.loads(source, parse_int=str, parse_float=str, parse_constant=str)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error


def _parse_yaml(path, source):
    """(what the source says, the same with all scalars as they are written)"""
    import yaml

    class Written(yaml.SafeLoader):
        yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<$"))]}

    try:
        return yaml.safe_load(source), yaml.load(source, Written)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def _words(value, text):
    """A value, and the same as it is written, -> a list of str: that of a mapping is JSON."""
    if isinstance(value, dict):
        return [json.dumps(_with_variables(value))]
    return [str(_with_variables(entry)) for entry in (text if isinstance(value, list) else [text])]


def _with_variables(value):
    if isinstance(value, dict):
        return {key: _with_variables(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_variables(entry) for entry in value]
    if isinstance(value, str):
        return VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), value)
    return value
