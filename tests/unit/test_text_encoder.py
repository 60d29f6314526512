"""tiktoken in place of the Rust tokenizer: the same ids, or it is not used."""

import json
import random
import unicodedata

import pytest
import tiktoken
from tokenizers import Regex, Tokenizer
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import Split

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


def test_both_engines_cut_sure_characters_alike():
    split = Split(Regex(WORDS), "isolated")
    for start in range(0, len(SURE), 1000):
        text = "".join(f"a{c}a1{c}1 {c}  {c}! {c}!\n{c}\n{c}{c}'{c} 'r{c}'{c}e'{c}{c} \r{c} "
                       for c in SURE[start:start + 1000])
        words = [word.encode() for word, _ in split.pre_tokenize_str(text)]
        # A vocabulary of just these words: only where tiktoken cuts as Rust does, each becomes its own token.
        ids = {word: number for number, word in enumerate(dict.fromkeys([*(bytes([b]) for b in range(256)), *words]))}
        assert tiktoken.Encoding("words", pat_str=WORDS, mergeable_ranks=ids, special_tokens={}).encode_ordinary(
            text) == [ids[word] for word in words]


def test_texts_of_all_kinds(tiny):
    rust, fast = encoders(tiny)
    draw = random.Random(0)
    pieces = [*SURE[:128], *draw.sample(SURE, 500), "e\u0301", "\u1112\u1161", "ไทย", "<|im_start|>", "<|im_end|>",
              "<|im_end|", "'Ll", "  ", "\n\n", " \t", "hello", "你好", "안녕"]
    for _ in range(3000):
        text = "".join(draw.choices(pieces, k=draw.randrange(20)))
        assert fast(text) == rust(text), repr(text)


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
