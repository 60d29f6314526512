"""Merge an adapter into its base model: one standalone folder, proved to be the same model before it gets its name.

  python merge_lora.py --adapter_path output_qwen --output_dir merged
  python merge_lora.py --adapter_path output_qwen --output_dir merged --base_model /where/it/is/now --ollama

Merges adapters of LoRA and Q-LoRA, with trained embeddings or without. Q-LoRA adapters go into the 16-bit model that
the 4-bit weights came from; if the adapter names a quantized one (GPTQ), give the 16-bit original as --base_model.

Works on the CPU with one copy of the model in memory: base and adapter answer some questions, then the adapter is
merged in place and saved into merged.unfinished, and what was saved is loaded again and must give the same answers.
Only then the folder is renamed: after a kill there is no `merged`, or a whole one.
"""

import re
import sys
from dataclasses import dataclass, field
from typing import Literal

from mechanisms import publish
from mechanisms.errors import UserError, user_errors_end_the_program
from mechanisms.flags import parse_into, prepare_command_line
from mechanisms.paths import find_base, not_empty
from mechanisms.quiet import silence


@dataclass
class MergeArguments:
    adapter_path: str = field(metadata={"help": "Folder of the adapter.", "metavar": "FOLDER", "exists": "model"})
    output_dir: str = field(metadata={"help": "Folder to make. It must not exist, or be empty."})
    base_model: str = field(default=None, metadata={
        "help": "The 16-bit model to merge into (default: the one named in the adapter).", "exists": "model"})
    max_shard_size: str = field(default="2GB", metadata={"help": "Largest weight file."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Precision of the merged weights. auto: that of the base model."})
    text_only: bool = field(default=False, metadata={
        "help": "Of a model with a vision tower, write the text part alone. Else the folder holds the whole of it."})
    ollama: bool = field(default=False, metadata={"help": "Write a Modelfile for Ollama too."})
    push_to_hub: bool = field(default=False, metadata={
        "help": "Upload the merged folder to the Hugging Face Hub. (The token is that of hf auth login, or HF_TOKEN.)"})
    hub_model_id: str = field(default=None, metadata={
        "help": "Its name there, as USER/NAME or NAME (default: that of --output_dir).", "metavar": "NAME"})
    hub_private_repo: bool | None = field(default=None, metadata={
        "help": "Make the repository private.", "nargs": "?", "const": True})


def parse_arguments(argv):
    """argv -> MergeArguments. Raises UserError with everything that is wrong with them."""
    args, words = parse_into((MergeArguments,), argv)
    problems = [f"unexpected argument {word!r}" for word in words]
    if not re.fullmatch(r"\d+(\.\d+)? *[KMGT]i?B", args.max_shard_size):
        problems.append(f"--max_shard_size {args.max_shard_size}: a number and its unit, such as 500MB or 2GB")
    problems += not_empty("--output_dir", args.output_dir)
    problems += publish.without_push(args)
    if problems:
        raise UserError("\n       ".join(problems))
    if find_base(args.adapter_path, args.base_model) is None:
        raise UserError(f"--adapter_path {args.adapter_path} is a whole model: there is nothing to merge")
    return args


if __name__ == "__main__":  # wrong flags and folders are worth knowing before torch is imported
    with user_errors_end_the_program():
        silence()
        COMMAND_LINE = prepare_command_line(__file__, sys.argv[1:])
        parse_arguments(COMMAND_LINE)

import gc
import hashlib
import json
import os
import shutil
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

from mechanisms import card
from mechanisms.compatibility import add_former_names
from mechanisms.console import say, table
from mechanisms.errors import first_line
from mechanisms.loading import LOADING_ERRORS, load_to_answer
from mechanisms.lora import experts_of
from mechanisms.paths import check_disk, source_name
from mechanisms.qwen1 import convert_if_qwen1
from mechanisms.serving import modelfile, serving_hints
from mechanisms.wrapper import Wrapper, check_text_only, is_wrapped

QUESTIONS = (
    [{"role": "user", "content": "Who are you?"}],
    [{"role": "system", "content": "You answer in one sentence."},
     {"role": "user", "content": "1, 2, 3, ...\n\n那么 42 呢？"}],
    [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello! How can I help?"},
     {"role": "user", "content": "print('Grüße'.upper())  # what does this Python line print?"}])
ANSWER_LENGTH = 24  # tokens
# Root mean square by which logits may differ, as a share of their standard deviation. Rounding alone gave at most 4e-6,
# 0.005 and 0.044 in networks of 2 to 36 layers; a wrong scale or a lost layer gives more than 1.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}
NEEDED_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                "chat_template.jinja", "README.md")


class Answer(NamedTuple):
    """What base and adapter said to one question.

    ids: prompt and greedy answer (1, n); logits: float32 (answer tokens, vocabulary), from which each was chosen.
    """

    ids: torch.Tensor
    logits: torch.Tensor


class Reference(NamedTuple):
    """What the merged folder is held against.

    template: the adapter's chat template; rules: see `tokenizer_rules`; prompts: [(text, ids)] of QUESTIONS; answers:
    [Answer] to them; digests: {name of tensor: digest} of the merged weights in memory; wrapper: the
    `mechanisms.wrapper.Wrapper` whose other tensors the folder holds, or None.
    """

    template: str
    rules: dict
    prompts: list
    answers: list
    digests: dict
    wrapper: Wrapper | None


# ---------------------------------------------------------------------------------------------------------------------
# Before: everything that can be refused without loading a weight
# ---------------------------------------------------------------------------------------------------------------------

def find_full_base(args):
    """The path of a base model that the adapter can be merged into. Raises UserError if its weights are quantized."""
    base = convert_if_qwen1(find_base(args.adapter_path, args.base_model))
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise UserError(f"the base model {base} cannot be read: {first_line(error)}. Say with --base_model where it "
                        "is") from error
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
        name = source_name(base)
        original = re.sub(r"-((GPTQ-)?Int[48]|(unsloth-)?bnb-4bit)$", "", name)
        example = f" (by its name, {original})" if original != name else ""
        raise UserError(f"{name} is quantized ({str(method).upper()}), and weights cannot be merged into rounded ones: "
                        f"give the 16-bit model that it was made from as --base_model{example}")
    return base


def clear(folder):
    """Remove what a killed run left at `folder`. Raises UserError if no folder can be made there."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        os.makedirs(folder)
        os.rmdir(folder)
    except OSError as error:
        raise UserError(f"--output_dir: {folder} cannot be made: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Merge
# ---------------------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def answer_questions(model, tokenizer):
    """Greedy answers of the model, as `Reference.prompts` and `Reference.answers`."""
    model.generation_config = GenerationConfig(  # greedy without the penalties that a model's own config may have
        eos_token_id=model.generation_config.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    prompts, answers = render_questions(tokenizer), []
    for _, ids in prompts:
        prompt = torch.tensor([ids])
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=ANSWER_LENGTH)
        answers.append(Answer(ids, answer_logits(model, ids, prompt.shape[1])))
    if not all(torch.isfinite(answer.logits).all() for answer in answers):
        raise UserError("base and adapter together compute NaN or infinity: one of them is broken, or --dtype has too "
                        "small a range for them")
    return prompts, answers


def render_questions(tokenizer):
    """[(text, ids)] of the prompts of QUESTIONS."""
    texts = [tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in QUESTIONS]
    return [(text, tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def tokenizer_rules(tokenizer):
    """Everything that decides which tokens a text becomes: words, merges, added tokens, ways to normalize and cut."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    last_call = "padding", "truncation"
    return {name: rule for name, rule in rules.items() if name not in last_call}


def answer_logits(model, ids, start):
    """float32 logits (answer tokens, vocabulary) for the tokens of `ids` (1, n) from `start` on."""
    return model(input_ids=ids, logits_to_keep=ids.shape[1] - start + 1).logits[0, :-1].float()


def merge_weights(model):
    """PeftModel -> the plain model, changed in place."""
    inner = model.get_base_model()
    head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    if inner.config.tie_word_embeddings and (hasattr(head, "lora_A") or hasattr(embedding, "lora_A")):
        # LoRA on one of the two: merged into the weight that they share it would change the other one too.
        layer = head.get_base_layer() if hasattr(head, "lora_A") else embedding.get_base_layer()
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        inner.config.tie_word_embeddings = False
    return model.merge_and_unload()


def save(folder, model, tokenizer, args, base, wrapper):
    """Write everything that the merged model needs into the new folder `folder`. Returns `Reference.digests`."""
    check_disk("--output_dir", os.path.dirname(os.path.abspath(folder)),
               sum(parameter.nbytes for parameter in model.parameters()) + (wrapper.size if wrapper else 0))
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder, max_shard_size=args.max_shard_size)
    tokenizer.save_pretrained(folder)
    add_former_names(folder)
    if wrapper:
        wrapper.complete(folder)
    write(folder, "README.md", model_card(args, base, str(model.dtype).removeprefix("torch."), wrapper))
    if args.ollama:
        write(folder, "Modelfile", modelfile(tokenizer, model.generation_config))
    return digests(model)


def write(folder, name, text):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text)


def digests(model):
    """{name: digest} of every tensor of the model."""
    return {name: hashlib.blake2b(tensor.detach().contiguous().view(torch.uint8).numpy(), digest_size=16).hexdigest()
            for name, tensor in model.state_dict().items()}


def model_card(args, base, dtype, wrapper):
    """README.md of the merged folder, with the adapter's own below."""
    loader, pipeline = (("AutoModelForImageTextToText", "image-text-to-text") if wrapper else
                        ("AutoModelForCausalLM", "text-generation"))
    adapter = os.path.basename(os.path.normpath(args.adapter_path))
    text = (card.head(base, "transformers", pipeline, args.push_to_hub)
            + f"`{source_name(base)}` with the adapter `{adapter}` merged into it ({dtype}). Prompts are ChatML, by "
            "this folder's chat template.\n\n"
            + card.how_to_load(args.hub_model_id or os.path.basename(os.path.normpath(args.output_dir)), loader))
    try:
        with open(os.path.join(args.adapter_path, "README.md"), encoding="utf-8") as file:
            return text + "\nThe adapter:\n\n" + re.sub(r"\A---\n.*?\n---\n+", "", file.read(), flags=re.DOTALL)
    except FileNotFoundError:
        return text


# ---------------------------------------------------------------------------------------------------------------------
# Verify
# ---------------------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def verify(folder, reference):
    """Prove that the model in `folder` is what base and adapter were. Returns what was found, as rows of a table.

    Raises UserError with the first difference.
    """
    missing = missing_files(folder)
    if missing:
        raise UserError(f"files are missing: {', '.join(missing)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizer has no class of its own for a file it cannot read
        raise UserError(f"its tokenizer cannot be loaded: {first_line(error)}") from error
    prompts = render_questions(tokenizer)
    if tokenizer.chat_template != reference.template or \
            [text.encode() for text, _ in prompts] != [text.encode() for text, _ in reference.prompts]:
        raise UserError("its chat template makes other prompts than the adapter's")
    if tokenizer_rules(tokenizer) != reference.rules or prompts != reference.prompts:
        raise UserError("its tokenizer makes other tokens than the adapter's")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()
    except LOADING_ERRORS as error:
        raise UserError(f"its weights cannot be read: {first_line(error)}") from error
    found = digests(model)
    changed = [name for name in reference.digests.keys() | found.keys()
               if found.get(name) != reference.digests.get(name)]
    if changed:
        raise UserError(f"weights that are not those of the merge, bit by bit: {', '.join(sorted(changed)[:5])}"
                        + (f" and {len(changed) - 5} more" if len(changed) > 5 else ""))
    others = check_others(folder, reference.wrapper) if reference.wrapper else []
    difference = max(compare(model, tokenizer, answer) for answer in reference.answers)
    return [("files", len(os.listdir(folder))), ("weights", f"{len(found)} tensors, bit by bit"), *others,
            ("prompts", f"{len(prompts)}, byte by byte"),
            ("logits", f"within {difference:.1e} of their spread ({allowed(model)})"),
            *([] if experts_of(model) else [("greedy answers", f"{len(reference.answers)}, token by token")])]


def check_others(folder, wrapper):
    """Prove that the folder's tensors beside the text part's are the base model's. Returns rows as `verify` does.

    Raises UserError.
    """
    if wrong := wrapper.differences(folder):
        raise UserError(f"tensors beside the text part that are not those of {wrapper.folder}: {', '.join(wrong[:5])}")
    return [("vision tower and others", f"{sum(map(len, wrapper.others.values()))} tensors, the base's bytes")]


def missing_files(folder):
    """The files that inference needs and the folder lacks."""
    names = set(os.listdir(folder))
    needed = [*NEEDED_FILES, "model.safetensors"]
    if "model.safetensors.index.json" in names:
        with open(os.path.join(folder, "model.safetensors.index.json"), encoding="utf-8") as file:
            needed = [*NEEDED_FILES, *sorted(set(json.load(file)["weight_map"].values()))]
    return [name for name in needed if name not in names]


def compare(model, tokenizer, answer):
    """How far the model's logits are from those of a reference `Answer`, in the measure of TOLERANCE.

    Raises UserError if that is too far, or if a model without experts would give another greedy answer.
    """
    expected, said = answer.logits, answer.ids[0, -len(answer.logits):]
    logits = answer_logits(model, answer.ids, answer.ids.shape[1] - len(said))
    tolerance, spread = TOLERANCE[model.dtype], expected.std()
    apart = (logits - expected).square().mean(-1).sqrt() / spread
    # Rounding sends a few tokens to other experts, which answer otherwise; what is wrong is wrong for most tokens.
    experts = experts_of(model)
    difference = (apart.median() if experts else apart.square().mean().sqrt()).item()
    if not difference <= tolerance:  # so that NaN fails
        raise UserError(f"its logits are {difference:.1e} of their spread away from those of base and adapter "
                        f"({allowed(model)})")
    if experts:
        return difference
    # The model is asked for all tokens at once, each after the right ones before it. Another token than the reference's
    # is no difference where the reference itself had the two so close that rounding decides.
    chosen = logits.argmax(-1)
    lead = expected.amax(-1) - expected.gather(-1, chosen[:, None])[:, 0]
    other = (chosen != said) & (lead > 2 * tolerance * spread)
    if other.any():
        place = int(other.nonzero()[0])
        raise UserError(f"its greedy answer is another: after {tokenizer.decode(said[:place])!r} it says "
                        f"{tokenizer.decode(chosen[place])!r}, base and adapter say {tokenizer.decode(said[place])!r}")
    return difference


def allowed(model):
    return f"rounding in {str(model.dtype).removeprefix('torch.')} may make it {TOLERANCE[model.dtype]:g}"


def merge(argv):
    """The whole run. Raises UserError for what the user can put right, and if the result is not the same model."""
    args = parse_arguments(argv)
    base = find_full_base(args)
    if args.text_only:
        check_text_only(base)
    wrapper = Wrapper(base) if is_wrapped(base) and not args.text_only else None
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    folder = os.path.normpath(args.output_dir)
    unfinished = folder + ".unfinished"
    clear(unfinished)
    if args.push_to_hub:
        publish.check_account()
        args.hub_model_id = publish.make_repository(args.hub_model_id or publish.default_name(folder),
                                                    args.hub_private_repo)
    say(f"Loading {base} and {args.adapter_path}")
    model, tokenizer = load_to_answer(args.adapter_path, args.base_model, args.dtype)
    generation = model.generation_config
    if args.ollama:
        modelfile(tokenizer, generation)  # what it refuses, it refuses now
    prompts, answers = answer_questions(model, tokenizer)
    model = merge_weights(model)
    model.generation_config = generation
    say(f"Merged; saving to {unfinished}")
    reference = Reference(tokenizer.chat_template, tokenizer_rules(tokenizer), prompts, answers,
                          save(unfinished, model, tokenizer, args, base, wrapper), wrapper)
    del model
    gc.collect()  # one copy at a time: the next is loaded from disk

    say("Loading it again to compare")
    try:
        found = verify(unfinished, reference)
    except UserError as error:
        raise UserError(f"the merged model is not what base and adapter are: {error}\n       {folder} was not written; "
                        f"{unfinished} holds the faulty result") from error
    os.replace(unfinished, folder)
    say("", "The same as base and adapter:", table(found), "", f"Done: {folder}", *serving_hints(folder, args.ollama))
    if args.push_to_hub:
        say(f"  Hub:        {publish.upload(folder, os.listdir(folder), args.hub_model_id)}")


def main(argv):
    with user_errors_end_the_program():
        merge(argv)


if __name__ == "__main__":
    main(COMMAND_LINE)
