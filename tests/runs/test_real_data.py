"""Every record and line of the real data with every real tokenizer: what takes too long for tests/unit."""

import unicodedata

import pytest

from finetune import load_tokenizer
from mechanisms.data.records import Notices, Problems, find_files, read_records
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


def expected_text(conversation):
    """What each assistant turn must come to, written down independently of the encoder."""
    return [unicodedata.normalize("NFC", message["content"]) + "<|im_end|>"
            for message in conversation.messages if message["role"] == "assistant"]


@pytest.mark.parametrize("shape", REAL_FILES)
def test_trained_ids_of_every_real_record_are_the_assistants_words(real, real_data, shape):
    name, tokenizer, encoder = real
    problems, conversations = Problems(), []
    for path in find_files([str(real_data / "datasets" / file) for file in REAL_FILES[shape]], problems):
        for _, record in read_records(path, problems):
            conversations.append(to_conversation(record, Notices()))
    assert not problems.rejected and not problems.fatal
    assert len(conversations) >= (200 if shape in ("conversations", "instruction") else 100)
    for conversation in conversations:
        samples = encoder(conversation)
        assert trained_text(tokenizer, *samples) == expected_text(conversation)
        answers = sum(message["role"] == "assistant" for message in conversation.messages)
        assert len(samples) == (answers if name == "qwen3" else 1)
        starts, ends = map(samples[-1].input_ids.count, tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
        assert starts == ends
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
