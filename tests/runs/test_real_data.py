"""Every record and line of the real data with every real tokenizer: what takes too long for tests/unit."""

import unicodedata
from collections import Counter

import pytest

from finetune import load_tokenizer
from mechanisms.data.records import Problems, find_files, read_records
from mechanisms.data.shapes import to_conversation
from mechanisms.data.text_encoder import OTHER
from tests.conftest import REAL_TOKENIZERS
from tests.unit.test_encoding import trained_text
from tests.unit.test_text_encoder import encoders

REAL_FILES = {"conversations": ["conversations/xiaozhi_chat.json", "conversations/qwenlm_test_sampled_qwen.json"],
              "messages": ["messages/tinker_cookbook_conversations.jsonl", "messages/ms-swift_chatml.jsonl"],
              "instruction": ["alpaca/alpaca_zh_demo.json", "alpaca/alpaca_en_demo.json", "alpaca/huanhuan.json",
                              "alpaca/identity.json"],
              "sharegpt": ["sharegpt/fastchat_dummy_conversation.json"]}


def expected_text(tokenizer_name, conversation):
    """What each assistant turn must come to, written down independently of the encoder."""
    last_user = max(i for i, message in enumerate(conversation.messages) if message["role"] == "user")
    expected = []
    for index, message in enumerate(conversation.messages):
        if message["role"] == "assistant":
            words = message["content"]
            if tokenizer_name == "qwen3" and index > last_user:  # only the answer at the end shows its (empty) thinking
                words = "<think>\n\n</think>\n\n" + words.lstrip("\n")
            expected.append(unicodedata.normalize("NFC", words) + "<|im_end|>")
    return expected


@pytest.mark.parametrize("shape", REAL_FILES)
def test_trained_ids_of_every_real_record_are_the_assistants_words(real, real_data, shape):
    name, tokenizer, encoder = real
    problems, conversations = Problems(), []
    for path in find_files([str(real_data / "datasets" / file) for file in REAL_FILES[shape]], problems):
        for _, record in read_records(path, problems):
            conversations.append(to_conversation(record, Counter()))
    assert not problems.rejected and not problems.fatal
    assert len(conversations) >= (200 if shape in ("conversations", "instruction") else 100)
    for conversation in conversations:
        sample = encoder(conversation)
        assert trained_text(tokenizer, sample) == expected_text(name, conversation)
        starts = sample.input_ids.count(encoder.start)
        assert starts == sample.input_ids.count(encoder.end)
        system = 0 if name == "qwen3" or conversation.messages[0]["role"] == "system" else 1
        assert starts == len(conversation.messages) + system


@pytest.mark.parametrize("name", REAL_TOKENIZERS)
def test_real_texts(real_data, name):
    rust, fast = encoders(load_tokenizer(str(real_data / "tokenizers" / name)))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted((real_data / "datasets").rglob("*"))
             if path.suffix in (".json", ".jsonl", ".txt", ".md")]
    lines = [line.replace("\\n", "\n").replace('"', "") for text in texts for line in text.splitlines()]
    assert len(lines) > 10_000 and sum(not OTHER.search(line) for line in lines) > 0.9 * len(lines)
    for line in [*lines, "<|im_start|>" + "<|im_end|>\n".join(lines[:100])]:
        assert fast(line) == rust(line), repr(line)
