"""Make a tiny Qwen model with random weights and its own tokenizer, so that everything here can be tried on a laptop.

    python examples/make_tiny_model.py --output_dir demo_output/tiny-chat
    python examples/make_tiny_model.py --output_dir /tmp/tiny-base --base     # with the end tokens of a base model

The folder has the files of a real Qwen checkpoint and loads with AutoTokenizer and AutoModelForCausalLM. Nothing in it
makes sense before fine-tuning, so whatever it says afterwards it was taught. The same arguments always give the same
weights and the same tokenizer.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python looks for modules in the script's folder only

from mechanisms.compatibility import add_former_names
from mechanisms.quiet import silence

if __name__ == "__main__":  # before torch: some of it is read when that is imported
    silence()

# isort: split
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config, Qwen2Tokenizer, Qwen3Config
from transformers.utils import logging

EXAMPLES = Path(__file__).resolve().parent
CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}
HEAD_SIZE = 32
MAX_LENGTH = 2048  # tokens

# One id each, but not special: they are part of an answer, so skip_special_tokens keeps them, as in Qwen.
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

# ChatML with a default system message, as in Qwen2. Tools are listed in the system turn; their results travel in a user
# turn, several in a row in the same one.
CHAT_TEMPLATE = r"""
{%- set system = messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.' %}
{{- '<|im_start|>system\n' + system }}
{%- if tools %}
    {{- '\n\nFunctions you may call:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\n</tools>\nTo call one, answer with:\n<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in messages[1 if messages[0].role == 'system' else 0:] %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' }}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson %}
            {{- '\n' if message.content or not loop.first }}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' + arguments + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}
""".strip()


def strings(value):
    """Every string inside a JSON value, keys of dicts aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def example_texts():
    """Return every string value found in the project's example data, whatever the record shape, as a list."""
    texts = []
    for path in sorted(EXAMPLES.glob("data/*.json")):
        texts += strings(json.loads(path.read_text(encoding="utf-8")))
    for path in [*sorted(EXAMPLES.glob("data/*.jsonl")), EXAMPLES / "persona.jsonl"]:
        for line in path.read_text(encoding="utf-8").splitlines():
            texts += strings(json.loads(line))
    return texts


def make_tokenizer(texts, vocab_size, base=False):
    """Train a byte-level BPE of at most `vocab_size` learned tokens on `texts` and return it as a Qwen2Tokenizer.

    Any text can be encoded, and decodes to itself (NFC): all 256 bytes are tokens. Special tokens have the ids after
    the learned ones. The end token is <|im_end|>, or <|endoftext|> if `base`. Both are as Qwen publishes them.
    """
    qwen = Qwen2Tokenizer().backend_tokenizer  # empty; gives Qwen's normalizer and its way of cutting text into words
    learned = Tokenizer(BPE())
    learned.normalizer, learned.pre_tokenizer = qwen.normalizer, qwen.pre_tokenizer
    trainer = BpeTrainer(vocab_size=vocab_size, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    learned.train_from_iterator(texts, trainer)
    bpe = json.loads(learned.to_str())["model"]

    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]], unk_token=None,
        eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=MAX_LENGTH,
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in MARKERS])
    tokenizer.chat_template = CHAT_TEMPLATE
    if not base:
        tokenizer.eos_token = "<|im_end|>"
    return tokenizer


def make_tiny_model(output_dir, texts, model_type="qwen3", tie_word_embeddings=True, hidden_size=128, num_layers=2,
                    vocab_size=1024, base=False):
    """Write a checkpoint folder with a tokenizer trained on `texts` and a random model; return its path.

    Args:
        texts: strings to train the tokenizer on.
        model_type: "qwen2" (Qwen1.5, 2 and 2.5) or "qwen3".
        hidden_size: a multiple of 32, the size of one attention head.
        vocab_size: most tokens the tokenizer may learn, special tokens not counted; 256 is one per byte.
        base: end tokens as in a base model: generation stops at <|endoftext|> only.
    """
    tokenizer = make_tokenizer(texts, vocab_size, base)
    endoftext, im_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    heads = hidden_size // HEAD_SIZE
    config = CONFIGS[model_type](
        vocab_size=-(-len(tokenizer) // 64) * 64,  # more rows than tokens, as in Qwen's own checkpoints
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),  # grouped-query attention, as in Qwen
        head_dim=HEAD_SIZE,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=hidden_size ** -0.5,  # Qwen's 0.02 suits wide models; a narrow one learns far slower from it
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=endoftext,
        eos_token_id=endoftext if base else im_end,
        pad_token_id=endoftext,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=endoftext, eos_token_id=endoftext if base else [im_end, endoftext], pad_token_id=endoftext,
    )
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    add_former_names(output_dir)
    return Path(output_dir)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="folder to write the checkpoint to")
    parser.add_argument("--model_type", choices=sorted(CONFIGS), default="qwen3")
    parser.add_argument("--base", action="store_true", help="end tokens as in a base model instead of a chat model")
    args = parser.parse_args()

    logging.disable_progress_bar()
    path = make_tiny_model(args.output_dir, example_texts(), model_type=args.model_type, base=args.base)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    print(f"{path}: a random {args.model_type} {'base' if args.base else 'chat'} model, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
