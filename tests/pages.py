"""The pages of docs/ that are made of what the code says. `python -m tests.sweep docs` writes them."""

import dataclasses
import re
from pathlib import Path

import transformers

import finetune
from mechanisms import hints
from mechanisms.declarations import TRAINER, read_flags
from mechanisms.refusals import LIMITS, NEEDS, OTHERS, REFUSED, never_taken

DOCS = Path(finetune.__file__).parent / "docs"
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
OTHER_TOOLS_HEAD = """# From LLaMA-Factory, Axolotl, TRL, ms-swift and Unsloth

The tables of names are made by `python -m tests.sweep docs` from `mechanisms/hints.py`; a test compares. A name of
another program on the command line or in a YAML file is answered with what to write here, all of them at once.

## Data

Files need no description here (no `dataset_info.json`, no `type:`): the shape of each record is recognised.

| there | here |
| --- | --- |
| LLaMA-Factory `alpaca`: `instruction`, `input`, `output`, `system`, `history` | read as it is |
| LLaMA-Factory `sharegpt`: `conversations`, `tools` as text, `function_call`, `observation` | read as it is |
| `columns:` of `dataset_info.json`; Axolotl's `field_messages` | `--columns prompt=... response=...` |
| Axolotl `chat_template`, ShareGPT, `completion`; `roles_to_train` | read as it is; `--loss_on` |
| Axolotl `weight` or `train` on a message | read as it is: 0 or false keeps the answer out of the loss |
| TRL `messages`; `prompt` and `completion`, as text or as messages; `tools` | read as it is |
| ms-swift `messages`; `query`, `response`, `history`, `system`; `loss` on a message | read as it is |
| Unsloth's `standardize_sharegpt`, `train_on_responses_only` | not needed |
| several datasets with shares (`interleave_probs`, `data.jsonl#500`) | `--data_path a.jsonl b.jsonl:0.3` |
| preference data, images, plain `text` | refused by name |

`python inspect_data.py -m MODEL -d DATA` shows, before anything is trained, what became of each record.

## What is otherwise

| there | here |
| --- | --- |
| `template: qwen`, `chat_template: chatml` | the model's own chat template |
| `packing: true` | `--packing` fills rows with whole samples, which do not see one another |
| without packing, batches are padded | never padded |
| LoRA with r 8 or 16 and a learning rate of 1e-4 or 2e-4 | r 64, alpha 16, and 3e-4 in the launchers |
| `resume_from_checkpoint` | the same command resumes |
| adapters | `--lora_weight_path` continues those of all of them, if they fit |

"""


def other_tools() -> str:
    """docs/from_other_tools.md"""
    def rows(table, mark):
        return [(mark.format(text), ", ".join(f"`{name}`" for name in sorted(names.split())))
                for text, names in table.items()]

    return (OTHER_TOOLS_HEAD + "## Names\n" + _table(("here", "there"), rows(hints.FLAGS, "`{}`"))
            + "\n## Names without a flag here\n" + _table(("here", "there"), rows(hints.NO_FLAG, "{}")))


def flags() -> str:
    """docs/flags.md"""
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


PAGES = {"flags.md": flags, "from_other_tools.md": other_tools}


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
