"""Text to ids as the model's own Rust tokenizer makes them; where there is much text, by tiktoken, which is faster."""

import functools
import json
import re
from typing import TYPE_CHECKING

import tiktoken
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split

from mechanisms.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# How the tokenizers of Qwen cut a text into the words that BPE then works on: 1 to 3, and from 3.5 on, where combining
# marks are part of words.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+")
PLAIN_BPE = {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False, "ignore_merges": False,
             "continuing_subword_prefix": "", "end_of_word_suffix": ""}
FLAGS = "lstrip", "rstrip", "single_word", "normalized"  # of an added token: it is not found just where it is written
# A text with any other character is left to the Rust tokenizer. These are what NFC leaves as they are, next to any of
# each other too, and what both regex engines take for the same kind of character (tests/unit/test_text_encoder.py looks
# at each): Latin, Cyrillic, Chinese, Japanese, Korean, punctuation, symbols, arrows, box drawing and emoji.
OTHER = re.compile("[^\0-\u02ff\u0400-\u0482\u048a-\u052f\u200b-\u2027\u2030-\u205e\u20a0-\u20bf\u2100-\u2125"
                   "\u2190-\u2328\u232b-\u2adb\u3000-\u3029\u3030-\u3098\u309b-\u9fff\uac00-\ud7a3\ufe0f\uff00-\uffef"
                   "\U0001f300-\U0001faff]")


# An added token that is to be encoded as the letters it is written with: MARK <first letter> MARK <the others> MARK.
# (So a chat template does not recognize it either.) It is a character for private use.
MARK = "\U000f0000"
MARKED = re.compile(f"{MARK}(.){MARK}(.*?){MARK}", re.DOTALL)


class TextEncoder:
    """text -> list of ids, the same ones as `tokenizer.encode(text, add_special_tokens=False)`.

    Added tokens between marks (see MARK) are encoded as the text they are, apart from what stands around them.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast"):
        self.rust: Tokenizer = tokenizer.backend_tokenizer
        self.tiktoken: tiktoken.Encoding | None = None
        self._remember()

    def _remember(self):
        self.spelled = functools.lru_cache(1000)(self._spelled)
        self.beginning = functools.lru_cache(100)(self.tiktoken_ids)  # mostly a system prompt, that of thousands

    def __getstate__(self):
        """Without what it remembers, which cannot be pickled, as for processes of the data loader that are spawned."""
        return {name: value for name, value in vars(self).items() if name not in ("spelled", "beginning")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._remember()

    def __call__(self, text: str) -> list[int]:
        if MARK not in text:
            return self._encode(text)
        text, *parts = MARKED.split(text)
        ids = self._encode(text)
        for first, rest, text in zip(parts[::3], parts[1::3], parts[2::3]):
            ids = ids + self.spelled(first + rest) + self._encode(text)
        return ids

    def _spelled(self, token):
        """The ids of an added token written out. Raises UserError if the tokenizer makes the token of it all the same.
        """
        text = self.rust.normalizer.normalize_str(token) if self.rust.normalizer else token
        words = [word for word, _ in self.rust.pre_tokenizer.pre_tokenize_str(text)] if self.rust.pre_tokenizer \
            else [text]
        ids = [part.id for word in words for part in self.rust.model.tokenize(word)]
        if self.rust.token_to_id(token) in ids:
            raise UserError(f"the tokenizer makes the control token {token!r} of its letters too: it cannot be told "
                            "apart from the same letters in a text")
        return ids

    def _encode(self, text):
        if self.tiktoken and not OTHER.search(text):
            first, end, rest = text.partition("<|im_end|>")  # a control token: what stands around it is apart
            try:
                if not rest:  # an answer, or the line break after it
                    return self.tiktoken_ids(text) if end else list(self.beginning(text))
                return self.beginning(first + end) + self.tiktoken_ids(rest)
            except ValueError:
                pass  # thousands of blanks in a row are more than its regex engine can remember
        # Not by transformers, which also works out where in the text each token lies.
        self.rust.no_padding()  # what an earlier call asked for would stay in force
        self.rust.no_truncation()
        self.rust.encode_special_tokens = False
        return self.rust.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def tiktoken_ids(self, text: str) -> list[int]:
        """Raises ValueError where its regex engine gives up."""
        return self.tiktoken.encode(text, allowed_special="all", disallowed_special=())

    def prepare_tiktoken(self) -> None:
        """Spend a second or two on making texts several times faster to encode, if the tokenizer's rules are Qwen's."""
        if self.tiktoken:  # the training data had it done, and the evaluation data is much too
            return
        rules = json.loads(self.rust.to_str())
        pattern = words_of(rules)
        if not pattern:
            return
        added = {token["content"]: token["id"] for token in rules["added_tokens"]}
        ranks = same_ranks(self.rust.model, rules["model"], added)
        if ranks:
            self.tiktoken = tiktoken.Encoding("the same", pat_str=pattern, special_tokens=added, mergeable_ranks=ranks)


def words_of(rules: dict) -> str | None:
    """The one of WORDS in these rules (tokenizer.json), if all others are Qwen's too but for the words that were
    learned and the tokens added."""
    added = [token["content"] for token in rules["added_tokens"]]
    if any(token[flag] for token in rules["added_tokens"] for flag in FLAGS) or "<|im_end|>" not in added:
        return None
    if any("<" in token[1:] or one != token and one in token for token in added for one in added):
        return None  # two could begin in the same place of a text, or one inside another
    if not PLAIN_BPE.items() <= rules["model"].items():
        return None
    return next((words for words in WORDS for trim in (True, False)
                 if before_bpe(words, trim).items() <= rules.items()), None)


def before_bpe(words: str, trim_offsets: bool) -> dict:
    """What Qwen's rules say of a text before BPE. (Offsets are where a token stood: they change no id.)"""
    return {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": trim_offsets, "use_regex": False}]}}


def same_ranks(bpe: BPE, rules: dict, added: dict[str, int]) -> dict[bytes, int] | None:
    """{bytes: id} with which tiktoken makes of every word what Rust's `bpe` with these `rules` makes of it, or None.

    tiktoken joins the neighbours whose union has the lowest id, Rust those that come first in a list of pairs. The two
    agree if the pairs stand in the order of the ids that they make, every token is a byte or made by one pair, and the
    list makes every token out of its bytes. For while they agree, what happens inside a piece of text is what happens
    if it stands alone: so neighbours whose union is a token are just the pair that makes it.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # imports torch

    learned = {word: number for word, number in rules["vocab"].items() if word not in added}
    words, joined = list(learned), ["".join(pair) for pair in rules["merges"]]
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    made = [learned.get(word, -1) for word in joined]
    if made != sorted(set(made)) or {*byte_of, *joined} != learned.keys():
        return None
    alone = Tokenizer(bpe)
    alone.pre_tokenizer = Split("\n", "removed")  # no word has one: byte 10 is another letter there
    texts = ["\n".join(words[start:start + 2000]) for start in range(0, len(words), 2000)]
    if [number for text in alone.encode_batch_fast(texts) for number in text.ids] != list(learned.values()):
        return None
    return {bytes(map(byte_of.get, word)): number for word, number in learned.items()}
