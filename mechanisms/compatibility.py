"""Saved folders as programs with an older transformers read them, too: today's names and the former ones side by side.

transformers 5 renamed what it writes, and 4.x, which many servers run, takes what it does not find for its default: a
rotary base of 10,000, 128 experts, no template. 5 reads both; where both stand, today's name wins. Can go when nobody
runs 4.x.
"""

import json
import os

FORMER_PLACE = "rope_theta", "partial_rotary_factor"  # of rope_parameters: 4.x has them beside rope_scaling


def add_former_names(folder):
    """Complete config.json and tokenizer_config.json of a saved model or adapter, as far as they are there.

    Raises OSError.
    """
    _edit(os.path.join(folder, "config.json"), _complete_config)
    _edit(os.path.join(folder, "tokenizer_config.json"), lambda settings: _complete_tokenizer(settings, folder))


def _edit(path, change):
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    change(settings)
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def _complete_config(config):
    for part in config.values():
        if isinstance(part, dict) and "model_type" in part:  # text_config and the like
            _complete_config(part)
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    if "use_cache" in config:
        config["use_cache"] = True  # training switches it off
    if "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # else there is one for each kind of layer, which 4.x spells by model
        config.update({name: rope[name] for name in FORMER_PLACE if name in rope})
        scaling = {name: value for name, value in rope.items() if name not in FORMER_PLACE}
        if scaling != {"rope_type": "default"}:
            config["rope_scaling"] = scaling


def _complete_tokenizer(settings, folder):
    if isinstance(settings.get("extra_special_tokens"), list):  # in 4.x that name is for a dict
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    template = os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(template):  # which programs on their own, such as converters, may not look for
        with open(template, encoding="utf-8") as file:
            settings["chat_template"] = file.read()
