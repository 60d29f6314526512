"""The model's tokenizer as training and inference use it, and what it tells of the model."""

import os

from transformers import AutoTokenizer, GenerationConfig

from mechanisms.console import say
from mechanisms.data.template import ChatTemplate
from mechanisms.errors import UserError, first_line
from mechanisms.limits import limited
from mechanisms.paths import hub_name

# In front of a chat template: the mode of prompts that ask for none. (`enable_thinking` is the variable of Qwen's.)
DEFAULT_MODE = "{{%- set enable_thinking = enable_thinking | default({}) -%}}\n"
QWEN_CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def load_tokenizer(path, cache_dir=None):
    """The model's tokenizer, ending turns with <|im_end|>; ChatML as Qwen has it if it brings no chat template."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, cache_dir=cache_dir, trust_remote_code=False)
        if tokenizer.vocab_size < 256:  # a folder without tokenizer files gives an empty one
            raise OSError("its tokenizer files are missing")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no usable tokenizer in {path}: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer in {path} has no fast (Rust) version, and this program needs one")
    return as_used(tokenizer, path)


def as_used(tokenizer, path):
    """Give a tokenizer just loaded from `path` what `load_tokenizer` promises; returns it."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = QWEN_CHATML
        say(f"note: the tokenizer in {path} has no chat template; it gets Qwen's ChatML")
    if "<|im_end|>" in tokenizer.get_added_vocab():
        tokenizer.eos_token = "<|im_end|>"  # base models come with <|endoftext|>, which no turn ends with
    tokenizer.apply_chat_template = limited(tokenizer.apply_chat_template, path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<|endoftext|>" if "<|endoftext|>" in tokenizer.get_added_vocab() else tokenizer.eos_token
    return tokenizer


def set_default_mode(tokenizer, modes):
    """Let the chat template build the prompt that was trained; which one that is, as a note, or "" if it has but one.

    modes: {"thinking": answers trained after the thinking prompt, "plain": those after the other one}. If all answers
    were trained after one of two prompts and the template's default is the other, its default is changed.
    """
    styles, names = ChatTemplate(tokenizer).styles, {True: "thinking", False: "plain"}
    if all(len(style.endings) == 1 for style in styles.values()):
        return ""
    trained = [mode for mode, name in names.items() if modes[name]]
    if len(trained) > 1:
        default = names[next(iter(styles.values())).default]
        return (f"{modes['thinking']:,} answers were trained after the thinking prompt (enable_thinking=True) and "
                f"{modes['plain']:,} after the plain one (False); the chat template's default is the {default} one")
    [mode] = trained

    def changed(template):
        if len(styles[template].endings) == 1 or styles[template].default == mode:
            return template
        for value in ("true", "false"):
            template = template.removeprefix(DEFAULT_MODE.format(value))
        return DEFAULT_MODE.format(str(mode).lower()) + template

    templates = tokenizer.chat_template
    tokenizer.chat_template = changed(templates) if isinstance(templates, str) else {
        name: changed(template) if template in styles else template for name, template in templates.items()}
    return (f"all answers were trained after the {names[mode]} prompt, which is the default of the saved chat template "
            f"(enable_thinking={mode})")


def is_base_model(path, tokenizer):
    """(bool, reason): whether the model was never trained on ChatML, so that its ChatML tokens mean nothing yet."""
    name = os.path.basename(os.path.normpath(hub_name(path) or path)).lower()
    for word, base in (("chat", False), ("instruct", False), ("base", True), ("qwen3", False)):
        if word in name:
            return base, f"its name holds {word!r}"
    try:
        ends = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:
        return True, "it has no generation config, and no name that says otherwise"
    end_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if end_id in (ends if isinstance(ends, list) else [ends]):
        return False, "its generation config ends at <|im_end|>"
    return True, "its generation config does not end at <|im_end|>"


def end_at_turns(generation, tokenizer):
    """Let a generation config end answers where turns end, which a base model's does not know."""
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    if tokenizer.eos_token_id not in ends:
        ends = [tokenizer.eos_token_id, *(end for end in ends if end is not None)]
    generation.eos_token_id = ends  # a list, where a folder may have one number
    generation.pad_token_id = tokenizer.pad_token_id
