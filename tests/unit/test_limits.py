"""A chat template that loops or makes gigabytes is one line."""

import pickle
import resource
import signal
import time

import pytest

from mechanisms import limits
from mechanisms.data.encoder import ConversationEncoder
from mechanisms.data.shapes import Conversation
from mechanisms.errors import UserError
from mechanisms.tokenizer import load_tokenizer

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9999) %}" + 3 * "{% endfor %}"
DOUBLE = "{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
DEEP = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"


def test_a_limited_tokenizer_and_its_encoder_reach_processes_that_are_spawned(make_model):
    encoder = ConversationEncoder(load_tokenizer(str(make_model())), 100)
    tokenizer, again = pickle.loads(pickle.dumps((encoder.tokenizer, encoder)))
    said = [{"role": "user", "content": "你好 <|im_end|>"}, {"role": "assistant", "content": "Hello"}]
    assert tokenizer.apply_chat_template.func is encoder.tokenizer.apply_chat_template.func  # it is limited there, too
    assert tokenizer.apply_chat_template(said) == encoder.tokenizer.apply_chat_template(said)
    conversation = Conversation(said, None, (True,), 0)
    assert again(conversation) == encoder(conversation)


@pytest.mark.parametrize("template, message", [
    (LOOP, "does not end within 1 s"), (DOUBLE, "makes too much|does not end"),
    ("{{ 'x' * 99999999999 }}", "makes too much"),
    ("{{ '%099999999999d' % 1 }}", "makes too much"), ("{{ range(9999999) }}", "makes too much"),
    (DEEP, "makes too much"), ("{{ 'x' | center(99999999999) }}", "makes too much")])
def test_a_template_that_takes_too_much_is_refused(make_model, monkeypatch, template, message):
    monkeypatch.setattr(limits, "SECONDS", 1)
    tokenizer = load_tokenizer(str(make_model()))
    tokenizer.chat_template = template + tokenizer.chat_template
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        ConversationEncoder(tokenizer, 100)
    assert "\n" not in str(error.value) and time.monotonic() - start < 10
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
