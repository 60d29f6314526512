"""tiktoken in place of the Rust tokenizer: the same ids, or it is not used."""

import json
import random
import unicodedata

import pytest
import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import Split
from transformers import Qwen3_5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from examples.make_tiny_model import example_texts, make_tokenizer
from finetune import load_tokenizer
from mechanisms.data.text_encoder import OTHER, WORDS, TextEncoder

SURE = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000 and not OTHER.match(chr(point))]


def encoders(tokenizer):
    """(by Rust, by tiktoken)"""
    fast = TextEncoder(tokenizer)
    fast.prepare_tiktoken()
    assert fast.tiktoken
    return TextEncoder(tokenizer), fast


@pytest.fixture(scope="module")
def tiny(make_model):
    return load_tokenizer(str(make_model()))


def test_nfc_leaves_sure_characters_alone():
    decompositions = [unicodedata.decomposition(chr(point)).split() for point in range(0x110000)]
    second = {chr(int(parts[1], 16)) for parts in decompositions if len(parts) == 2 and parts[0][0] != "<"}
    second |= {chr(point) for point in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}  # of Korean syllables
    assert not second & set(SURE)  # none is joined with what stands before it
    assert not any(map(unicodedata.combining, SURE))
    assert NFC().normalize_str("".join(SURE)) == "".join(SURE) == unicodedata.normalize("NFC", "".join(SURE))
    assert len(SURE) > 45_000 and all(letter in SURE for letter in "aÉжß1好，の한。😀→ \n")


@pytest.mark.parametrize("pattern", WORDS)
def test_both_engines_cut_sure_characters_alike(pattern):
    split = Split(Regex(pattern), "isolated")
    for start in range(0, len(SURE), 1000):
        text = "".join(f"a{c}a1{c}1 {c}  {c}! {c}!\n{c}\n{c}{c}'{c} 'r{c}'{c}e'{c}{c} \r{c} "
                       for c in SURE[start:start + 1000])
        words = [word.encode() for word, _ in split.pre_tokenize_str(text)]
        # A vocabulary of just these words: only where tiktoken cuts as Rust does, each becomes its own token.
        ids = {word: number for number, word in enumerate(dict.fromkeys([*(bytes([b]) for b in range(256)), *words]))}
        assert tiktoken.Encoding("words", pat_str=pattern, mergeable_ranks=ids, special_tokens={}).encode_ordinary(
            text) == [ids[word] for word in words]


def texts_of_all_kinds():
    draw = random.Random(0)
    pieces = [*SURE[:128], *draw.sample(SURE, 500), "e\u0301", "\u1112\u1161", "ไทย", "<|im_start|>", "<|im_end|>",
              "<|im_end|", "'Ll", "  ", "\n\n", " \t", "hello", "你好", "안녕", "❤\ufe0f", "हिन्दी"]
    for _ in range(3000):
        yield "".join(draw.choices(pieces, k=draw.randrange(20)))


def test_texts_of_all_kinds(tiny):
    rust, fast = encoders(tiny)
    for text in texts_of_all_kinds():
        assert fast(text) == rust(text), repr(text)


@pytest.fixture(scope="module")
def large():
    """A tokenizer with the rules and the number of words of Qwen3.5's: what was learned of English, then the characters
    of two and three bytes, and pairs of them, a red heart (two characters: one is a mark) among them."""
    learned = json.loads(make_tokenizer([text for text in example_texts() if text.isascii()], 600)
                         .backend_tokenizer.to_str())["model"]
    letter = bytes_to_unicode()
    first, following = ([letter[byte] for byte in range(*ends)] for ends in ((0xC2, 0xF5), (0x80, 0xC0)))
    two = [(a, b) for a in first for b in following]
    three = [(a + b, c) for a, b in two for c in following]
    some = ["".join(pair) for pair in three[::500]]
    heart = tuple("".join(map(letter.get, character.encode())) for character in "❤\ufe0f")
    pairs = [heart, *((a, b) for a in some for b in some)]
    merges = [*map(tuple, learned["merges"]), *two, *three, *pairs][:248_044 - len(letter)]
    words = [*sorted(letter.values()), *map("".join, merges)]
    tokenizer = Qwen3_5Tokenizer(vocab={word: number for number, word in enumerate(words)}, merges=merges)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)
                          for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    return tokenizer


def test_the_large_vocabulary_and_the_rules_that_came_with_it(large):
    assert large.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [248_044, 248_045, 248_046]
    rust, fast = encoders(large)
    for text in texts_of_all_kinds():
        assert fast(text) == rust(text), repr(text)
    assert fast("❤❤\ufe0f") == [*fast("❤"), *fast("❤"), *fast("\ufe0f")]  # a mark begins a word, as a letter does


@pytest.mark.parametrize("text", ["", " " * 300_000, "x" + " " * 300_000 + "x", "a" * 50_000, "好" * 20_000])
def test_texts_that_are_hard_on_an_engine(tiny, text):
    rust, fast = encoders(tiny)
    assert fast(text) == rust(text)


def swapped(rules):
    merges = rules["model"]["merges"]
    merges[100], merges[101] = merges[101], merges[100]


def unreachable(rules):
    """A token out of a pair that never comes to be: its letters join another way before."""
    model = rules["model"]
    for pair in reversed(model["merges"]):
        word = "".join(pair)
        if word[1:] in model["vocab"] and pair != [word[0], word[1:]]:
            pair[:] = word[0], word[1:]
            return
    raise AssertionError("no such token")


@pytest.mark.parametrize("change", [
    lambda rules: rules.update(normalizer=None),
    lambda rules: rules["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
    lambda rules: rules["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=WORDS[1].replace("M", "N")),
    lambda rules: rules["model"].update(dropout=0.1),
    lambda rules: rules["model"].update(ignore_merges=True),
    lambda rules: rules["added_tokens"][0].update(lstrip=True),
    lambda rules: rules["added_tokens"][0].update(normalized=True),
    lambda rules: rules["added_tokens"].append({**rules["added_tokens"][0], "content": "<|im_end|>>", "id": 9999}),
    lambda rules: rules["added_tokens"].append({**rules["added_tokens"][0], "content": "x<", "id": 9999}),
    swapped,
    unreachable,
])
def test_other_rules_are_left_to_rust(tiny, change):
    rules = json.loads(tiny.backend_tokenizer.to_str())
    change(rules)

    class Changed:
        backend_tokenizer = Tokenizer.from_str(json.dumps(rules))

    encoder = TextEncoder(Changed)
    encoder.prepare_tiktoken()
    assert encoder.tiktoken is None
