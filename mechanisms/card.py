"""What the model cards of all results share: metadata with the base model's licence, and how to load the result."""

import json
import os
import re

from mechanisms.paths import card_metadata, could_be_on_the_hub, source_name

LICENCE = "license", "license_name", "license_link"  # keys of a card's metadata
BARS, BLOCKS = 40, "▁▂▃▄▅▆▇█"


def head(base, library, pipeline, ask_hub=False, **metadata):
    """The metadata of a card, between its lines of ---.

    base: path of the base model, whose licence is the result's; ask_hub: whether to look for its card there.
    """
    of_base = base_metadata(base, ask_hub)
    foreign = {"base_model": source_name(base), **{key: of_base[key] for key in LICENCE if key in of_base}}
    own = {"library_name": library, "pipeline_tag": pipeline, **metadata}
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in foreign.items()]
    lines += [f"{key}: {value}" for key, value in own.items()]
    return "\n".join(["---", *lines, "---", "", ""])


def base_metadata(base, ask_hub):
    """The metadata of the base model's card; {} if there is none."""
    name = source_name(base)
    if os.path.isdir(base) or os.path.isdir(name) or not ask_hub:
        return card_metadata(name) or card_metadata(base)
    from huggingface_hub import hf_hub_download

    try:
        return card_metadata(os.path.dirname(hf_hub_download(name, "README.md")))
    except OSError:  # it has no card, or none that we may read
        return {}


def for_the_hub(text):
    """A card as the Hub takes it, which refuses one whose base model is a folder: without it, and without its path."""
    base = re.search(r'^base_model: "(.*)"\n', text, re.MULTILINE)
    if not base or could_be_on_the_hub(base[1]) and not os.path.isdir(base[1]):
        return text
    return text.replace(base[0], "").replace(base[1], os.path.basename(os.path.normpath(base[1])))


def loss_picture(history):
    """Trainer's log history -> a line that draws the loss of the run in letters; "" before there is one."""
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if len(losses) < 2:
        return ""
    groups = [losses[len(losses) * place // BARS:len(losses) * (place + 1) // BARS] for place in range(BARS)]
    means = [sum(group) / len(group) for group in groups if group]
    least, span = min(means), max(means) - min(means) or 1
    bars = "".join(BLOCKS[round((mean - least) / span * (len(BLOCKS) - 1))] for mean in means)
    return f"\nLoss: {losses[0]:.4g} `{bars}` {losses[-1]:.4g}\n"


def how_to_load(name, loader):
    """A piece of Python that loads the result. loader: its class in transformers or peft."""
    package = "peft" if loader == "AutoPeftModelForCausalLM" else "transformers"
    imports = f"from {package} import {loader}\nfrom transformers import AutoTokenizer" if package == "peft" else \
        f"from transformers import {loader}, AutoTokenizer"
    return (f"```python\n{imports}\n\nmodel = {loader}.from_pretrained({json.dumps(name)})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})\n```\n")
