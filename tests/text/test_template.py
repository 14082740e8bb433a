"""Chat templates: equal to transformers on real ones, refused with the field's name when they cannot be rendered."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from engine.errors import InvalidParam, ModelError
from engine.text import ChatTemplate

GOLDEN = json.loads((Path(__file__).parent.parent / "fixtures/tokenizers/chat_templates.json").read_text("utf-8"))
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("name", GOLDEN["expected"])
def test_equals_transformers(name: str) -> None:
    template, case = name.rsplit("/", 1)
    arguments = dict(GOLDEN["cases"][case])
    messages, expected = arguments.pop("messages"), GOLDEN["expected"][name]
    compiled = ChatTemplate(GOLDEN["templates"][template], GOLDEN["special_tokens"])
    if expected is None:
        with pytest.raises(InvalidParam, match=r"messages: the chat template refused them: .*alternate"):
            compiled.render(messages, **arguments)
    else:
        assert compiled.render(messages, **arguments) == expected


def test_messages_are_not_changed() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]
    before = json.dumps(messages)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    assert template.render(messages, add_generation_prompt=False, continue_final_message=True) == "Hi</s>Well,"
    assert json.dumps(messages) == before


def test_trimmed_messages_are_continued_trimmed() -> None:
    template = ChatTemplate("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}")
    messages = [{"role": "assistant", "content": "Well, "}]
    assert template.render(messages, add_generation_prompt=False, continue_final_message=True) == "<Well,"


def test_content_parts_are_continued() -> None:
    template = ChatTemplate("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}!{% endfor %}")
    messages = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert template.render(messages, add_generation_prompt=False, continue_final_message=True) == "ab"
    assert messages[0]["content"][1]["text"] == "b"


@pytest.mark.parametrize(
    ("source", "field"),
    [
        ("{{ raise_exception('no system role') }}", "messages"),
        ("{{ messages[0].content + 1 }}", "messages"),
        ("{{ messages[0].content.nothing.at_all }}", "messages"),
        ("{{ messages.__class__.__mro__ }}", "messages"),  # the sandbox
        ("{{ messages.append(1) }}", "messages"),  # and it is immutable
        ("{{ cycler.__init__.__globals__.os }}", "messages"),
    ],
)
def test_what_fails_while_rendering_names_the_messages(source: str, field: str) -> None:
    with pytest.raises(InvalidParam) as caught:
        ChatTemplate(source).render(HELLO)
    assert caught.value.param == field


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 1000000000 }}",
        "{{ [0] * 1000000000 }}",
        "{{ 1000000000 * 'ab' }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}xxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    ],
)
def test_bombs_end_soon(source: str) -> None:
    start_s = time.monotonic()
    with pytest.raises(InvalidParam):
        ChatTemplate(source).render(HELLO)
    assert time.monotonic() - start_s < 10


def test_a_broken_template_is_a_model_error_with_its_line() -> None:
    with pytest.raises(
        ModelError, match=r"the chat template of model\.gguf has a syntax error in line 2.*chat_template"
    ):
        ChatTemplate("{{ messages }}\n{% for %}", origin="model.gguf")
    with pytest.raises(ModelError, match="syntax error in line 1"):
        ChatTemplate("{{ messages | no_such_filter }}")


def test_variables_are_only_those_that_the_template_reads() -> None:
    template = ChatTemplate(
        "{{ messages[0].content }}{% if enable_thinking %}?{% endif %}{{ bos_token }}", {"bos_token": "B"}
    )
    assert template.render(HELLO) == "HelloB"
    assert template.render(HELLO, variables={"enable_thinking": True}) == "Hello?B"
    for name in ("other", "messages", "bos_token", "raise_exception", "add_generation_prompt"):
        with pytest.raises(InvalidParam, match=f"chat_template_kwargs: .*{name}"):
            template.render(HELLO, variables={name: "x"})


def test_empty_and_contradicting_requests() -> None:
    template = ChatTemplate("{{ messages[-1].content }}")
    with pytest.raises(InvalidParam, match="messages: must not be empty"):
        template.render([])
    with pytest.raises(InvalidParam, match="continue_final_message: cannot be used together"):
        template.render(HELLO, continue_final_message=True)
    with pytest.raises(InvalidParam, match="continue_final_message: the last message has no text"):
        template.render([{"role": "assistant"}], add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(InvalidParam, match="continue_final_message: the chat template drops"):
        ChatTemplate("nothing").render(HELLO, add_generation_prompt=False, continue_final_message=True)


def test_the_clock_is_there() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(HELLO).isdigit()
