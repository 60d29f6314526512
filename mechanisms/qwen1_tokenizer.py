"""The tokenizer of Qwen-1 models as Qwen2's, without their weights."""

import base64
import os

from huggingface_hub import snapshot_download
from tokenizers import AddedToken
from transformers import PretrainedConfig, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mechanisms.errors import UserError
from mechanisms.hubs import model_here
from mechanisms.tokenizer import QWEN_CHATML, as_used, load_tokenizer

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))]


def load_any_tokenizer(path, cache_dir=None):
    """`load_tokenizer` of any model, also of a Qwen-1 model that was not converted. Raises UserError."""
    path = model_here(path, cache_dir)
    try:
        config, _ = PretrainedConfig.get_config_dict(path, cache_dir=cache_dir)
        if config.get("model_type") != "qwen":
            return load_tokenizer(path, cache_dir)
        source = path if os.path.isdir(path) else snapshot_download(
            path, cache_dir=cache_dir, allow_patterns=["*.json", "qwen.tiktoken"])
    except (OSError, ValueError):  # a folder with a tokenizer alone, or nothing at all: the tokenizer says which
        return load_tokenizer(path, cache_dir)
    length = config.get("seq_length") or config["max_position_embeddings"]
    return as_used(qwen1_tokenizer(source, config["vocab_size"], length), path)


def qwen1_tokenizer(source, vocab_size, max_length):
    """qwen.tiktoken as Qwen2's tokenizer, which cuts text into words as Qwen-1's did.

    Raises UserError if the file is missing or damaged, or does not fit the model.
    """
    path = os.path.join(source, "qwen.tiktoken")
    ranks = read_ranks(path)
    letters = bytes_to_unicode()  # byte-level BPE writes each byte as one printable letter

    def written(token):
        return "".join(letters[byte] for byte in token)

    merges = [tuple(map(written, pair)) for pair in _merges(ranks, path)]
    tokenizer = Qwen2Tokenizer(
        vocab={written(token): rank for token, rank in ranks.items()}, merges=merges, unk_token=None,
        eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=max_length)
    # One difference from Qwen-1 is left, as in all later Qwen: it composed the text (NFC) before it looked for special
    # tokens, so that the character U+0338 right after one took it apart.
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    if len(tokenizer) > vocab_size:
        raise UserError(f"{path} has {len(tokenizer):,} tokens with the special ones, and the model knows "
                        f"{vocab_size:,}: it belongs to another model")
    tokenizer.chat_template = QWEN_CHATML
    return tokenizer


def read_ranks(path):
    """{token as bytes: rank} of a .tiktoken file. Raises UserError."""
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(f"the tokenizer of the Qwen-1 model cannot be read, {path}: {error.strerror}") from error
    ranks = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as error:
                raise UserError(f"{path}:{number} is damaged: not a token in base64 and its rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not {bytes([byte]) for byte in range(256)} <= ranks.keys():
        raise UserError(f"{path} is damaged: tokens are missing")
    return ranks


def _merges(ranks, path):
    """The merges, as [(left, right)] in order, with which BPE makes the same tokens as tiktoken does of its ranks.

    tiktoken joins the neighbours whose whole has the lowest rank, BPE those whose merge comes first. What tiktoken
    joined last in a token does not depend on the text around it, so it is enough to let it build each token alone.
    """
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [token[place:place + 1] for place in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:])]
            lowest = min(joined)
            if lowest == len(ranks):
                raise UserError(f"{path} is damaged: the token {token!r} cannot be built from shorter ones")
            place = joined.index(lowest)
            parts[place:place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges
