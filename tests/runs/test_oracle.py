"""Labels against an oracle written apart from the encoder; `python -m tests.sweep` has the long versions."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mechanisms.data.encoder import IGNORED, ConversationEncoder
from mechanisms.tokenizer import load_tokenizer
from tests.fuzz import Fuzzer, records
from tests.oracle import Difference, Oracle, load
from tests.sweep import THINKING, dataset_paths, sweep, tokenizer_paths
from tests.templates import TEMPLATES
from tests.unit.test_encoding import conversation

NAMES = ("qwen1", "qwen2", "qwen2.5", "qwen3", "qwen3-instruct-2507", "qwen3-thinking-2507", "qwen3-coder",
         "qwen3.5-think", "qwen3.5-nothink", "qwen3.8")


def tiny_tokenizer(make_model, template):
    tokenizer = load_tokenizer(str(make_model()))
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_a_share_of_all_real_data(real_data, name, cache_dir):
    tokenizer = load(tokenizer_paths(real_data)[name], cache_dir)
    answers = 0
    for thinking in THINKING:
        compared, differences = sweep(tokenizer, dataset_paths(real_data), thinking, every=50, longest=40)
        assert not differences, "\n".join(differences)
        answers += compared
    assert answers > 400


@pytest.fixture(scope="module")
def fuzzer(make_model, request):
    tokenizers = {name: tiny_tokenizer(make_model, template) for name, template in TEMPLATES.items()
                  if name != "cut"}  # whose words at a tag transformers' own call loses
    return Fuzzer(tokenizers)


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(record=records(), way=st.integers(0, 100))
def test_any_record(fuzzer, record, way):
    fuzzer.check(record, way)


def test_the_fuzz_reached_answers(fuzzer):
    assert sum(count for what, count in fuzzer.counts.items() if what.endswith(": answers")) > 100, fuzzer.counts


QUESTIONS = "one", "first", "two", "second"



def without_last_span(labels):
    end = max(place for place, label in enumerate(labels, 1) if label != IGNORED)
    start = max((place for place, label in enumerate(labels[:end], 1) if label == IGNORED))
    return labels[:start] + [IGNORED] * (len(labels) - start)


FAULTS = {  # what is wrong: (samples of two answers -> other samples)
    "a token of the prompt is trained": lambda samples: [*samples[:-1], samples[-1]._replace(labels=[
        token if following != IGNORED else label for token, label, following in zip(
            samples[-1].input_ids, samples[-1].labels, [*samples[-1].labels[1:], IGNORED])])],
    "the end is not trained": lambda samples: [samples[0]._replace(labels=[
        IGNORED if following == IGNORED else label for label, following in zip(
            samples[0].labels, [*samples[0].labels[1:], IGNORED])]), *samples[1:]],
    "another label": lambda samples: [samples[0]._replace(labels=[
        label if label == IGNORED else 7 for label in samples[0].labels]), *samples[1:]],
    "an answer twice": lambda samples: [*samples, samples[-1]],
    "an answer is missing": lambda samples: [*samples[:-1], samples[-1]._replace(
        labels=without_last_span(samples[-1].labels))],
    "another context": lambda samples: [*samples[:-1], samples[-1]._replace(
        input_ids=[9, *samples[-1].input_ids[1:]])]}


@pytest.mark.parametrize("template", ["plain", "hybrid", "thinking", "kept"])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_sees_faults(make_model, template, fault):
    tokenizer = tiny_tokenizer(make_model, TEMPLATES[template])
    record = conversation(*QUESTIONS)
    samples = ConversationEncoder(tokenizer, 2048)(record)
    oracle = Oracle(tokenizer)
    assert oracle.compare(record.messages, None, record.trained, samples) == 2
    with pytest.raises(Difference):
        oracle.compare(record.messages, None, record.trained, FAULTS[fault](samples))


def test_the_oracle_sees_a_sample_too_many(make_model):
    tokenizer = tiny_tokenizer(make_model, TEMPLATES["plain"])
    record, encoder = conversation(*QUESTIONS), ConversationEncoder(tokenizer, 2048)
    [whole] = encoder(record)
    first, second = encoder(conversation(*QUESTIONS[:2])), whole._replace(labels=[
        IGNORED if place < len(whole.labels) // 2 else label for place, label in enumerate(whole.labels)])
    with pytest.raises(Difference, match="2 samples, 1 are needed"):
        Oracle(tokenizer).compare(record.messages, None, record.trained, [*first, second])


def test_the_saved_tokenizer_is_not_changed_by_the_oracle(make_model):
    assert AutoTokenizer.from_pretrained(make_model()).chat_control_tokens is None
