"""Records as nobody would write them, and as people do, against the oracle."""

import collections

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from mechanisms.data.encoder import IGNORED, ConversationEncoder
from mechanisms.data.records import Notices
from mechanisms.data.shapes import BadRecord, to_conversation
from tests.oracle import Oracle

PIECES = ["<think>", "</think>", "<think>\nhm\n</think>\n\n", "<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>",
          "<tool_call>", "</tool_call>", '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>',
          "<tool_response>\n", "\n</tool_response>", "<|fim_prefix|>", "<|file_sep|>", "\n", "\n\n", " ", "  code",
          "\t", "word", "Yes.", "No", "好，", "서울", "e\u0301", "😀",
          "{{ x }}", "{% raw %}", "\0", "\u2028", "'", '"', "\\", "0"]
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
WORDS = st.one_of(TEXT, TEXT, st.text("ab \n.é好", min_size=1, max_size=12)).map(
    lambda text: text if text.strip() else text + "x")
JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(), WORDS, st.just("\ud800")),
                    lambda child: st.one_of(st.lists(child, max_size=3),
                                            st.dictionaries(st.one_of(WORDS, st.sampled_from(["x", "name"])), child,
                                                            max_size=3)), max_leaves=6)
ARGUMENTS = st.one_of(*[st.dictionaries(st.sampled_from(["x", "city"]), JSON, max_size=2)] * 3,
                      st.sampled_from(['{"x": 1}', '{"x": 1}', None, "{", "[" * 5000]))
CALL = st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g"]), "arguments": ARGUMENTS})})
SWITCH = st.one_of(st.just({}), st.just({}), st.dictionaries(
    st.sampled_from(["train", "loss", "weight", "loss_weight", "loss_scale", "mask"]),
    st.sampled_from([0, 1, True, False]), max_size=1))
THOUGHT = st.one_of(st.just({}), st.just({}), st.dictionaries(
    st.sampled_from(["reasoning_content", "reasoning", "thinking"]), WORDS, max_size=1))


@st.composite
def answers(draw):
    block = draw(st.sampled_from(["", "", "", "<think>\nhm\n</think>\n\n", "<think>\n\n</think>\n\n"]))
    return {"role": "assistant", "content": block + draw(WORDS), **draw(THOUGHT), **draw(SWITCH)}


@st.composite
def turns(draw):
    """A question and its answer, with tool calls between the two now and then."""
    found = [{"role": "user", "content": draw(WORDS)}]
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        found += [{"role": "assistant", "content": draw(st.one_of(st.just(""), WORDS)),
                   "tool_calls": draw(st.lists(CALL, min_size=1, max_size=2)), **draw(THOUGHT)},
                  *({"role": "tool", "content": draw(WORDS)} for _ in range(draw(st.integers(1, 2))))]
    return [*found, draw(answers())]


@st.composite
def records(draw):
    """Mostly records that can be trained on."""
    messages = sum(draw(st.lists(turns(), min_size=1, max_size=4)), [])
    if draw(st.sampled_from([0, 0, 0, 1])):
        messages.insert(0, draw(answers()))
    if draw(st.booleans()):
        messages.insert(0, {"role": "system", "content": draw(WORDS)})
    record = {"messages": messages}
    if draw(st.sampled_from([0, 0, 0, 1])):
        record["tools"] = [{"type": "function", "function": {"name": "f", "parameters": draw(JSON)}}]
    if draw(st.sampled_from([0] * 9 + [1])):  # and some that cannot
        spoilt = draw(st.sampled_from(messages))
        spoilt[draw(st.sampled_from(["role", "content", "tool_calls", "images", "thinking"]))] = draw(JSON)
    if draw(st.sampled_from([0] * 9 + [1])):
        record[draw(st.sampled_from(["system", "images", "messages", "functions"]))] = draw(JSON)
    return record


class Fuzzer:
    """Encodes records in every way and asks the oracle; counts what became of them."""

    def __init__(self, tokenizers):
        self.counts, self.ways = collections.Counter(), []
        for name, tokenizer in tokenizers.items():
            for thinking in ("auto", "on", "off"):
                oracle = Oracle(tokenizer, thinking)
                if oracle.possible():
                    self.ways.append((name, oracle, {other: ConversationEncoder(
                        tokenizer, 1 << 20, thinking=thinking, **dict(filter(None, [other])))
                        for other in (None, ("earlier_answers", "skip"), ("loss_on", "last"), ("loss_on", "all"))}))

    def check(self, record, way):
        """Raises whatever is wrong."""
        name, oracle, encoders = self.ways[way % len(self.ways)]
        try:
            conversation = to_conversation(record, Notices())
        except BadRecord as bad:
            self.counts[f"not a conversation: {bad.args[0][0][0]}"] += 1
            return
        encoded = {}
        for other, encoder in encoders.items():
            try:
                encoded[other] = encoder(conversation, Notices())
            except BadRecord as bad:
                encoded[other] = bad.args[0]
        samples = encoded[None]
        if isinstance(samples, list) and not any(isinstance(part, tuple) and not hasattr(part, "labels")
                                                 for part in samples):
            assert not oracle.refused(conversation.messages, conversation.trained), "should be refused"
            self.counts[f"{name}: answers"] += oracle.compare(
                conversation.messages, conversation.tools, conversation.trained, samples)
            if samples:
                assert encoded["earlier_answers", "skip"] == samples[-1:]
                last = encoded["loss_on", "last"]
                assert not last or [last[0].input_ids] == [samples[-1].input_ids] and set(
                    token for token in last[0].labels) <= {IGNORED, *samples[-1].labels}
                everything = encoded["loss_on", "all"]
                assert [sample.input_ids for sample in everything] == [sample.input_ids for sample in samples]
                assert everything[:-1] == samples[:-1]
                assert all(label in (IGNORED, token) for token, label in zip(
                    everything[-1].input_ids, everything[-1].labels))
        else:
            self.counts["refused: " + samples[0][0]] += 1


def fuzz(tokenizers, cases, first):
    """-> (answers compared, 0). Raises the first difference, as small as hypothesis can make it."""
    fuzzer = Fuzzer(tokenizers)

    @seed(first)
    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(records(), st.integers(0, len(fuzzer.ways) - 1))
    def run(record, way):
        fuzzer.counts["cases"] += 1
        fuzzer.check(record, way)

    run()
    print(*(f"{count:>9,} {what}" for what, count in sorted(fuzzer.counts.items())), sep="\n")
    return sum(count for what, count in fuzzer.counts.items() if what.endswith(": answers")), 0
