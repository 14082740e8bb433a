"""Chat templates: messages to prompt text, in a sandbox.

Templates come from the model or the operator, never from a request. Knows nothing about token ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import InvalidParam, ModelError

MAX_RENDERED_CHARS = 8 << 20  # eight times the longest request text
MAX_OPERAND_ITEMS = 1 << 24  # a string or list that one `*`, `**` or `+` may make
# Marks the end of the message that the model shall continue. A template that trims the message
# also trims the space, which tells that the text before the mark is to be trimmed as well.
_CUT = "\u2063octavo-cut\u2063 "

# What `render` itself passes; `chat_template_kwargs` cannot override it.
_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})


class _RaisedByTemplate(TemplateError):
    """The template refused the messages with `raise_exception`."""


class _TooLarge(TemplateError):
    """The template tried to make something far larger than any prompt."""


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's part for training; when serving, its body is all there is."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with bounds on operators that make big values out of small ones."""

    intercepted_binops = frozenset({"*", "**", "+"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= 1 << 16 and abs(right) <= 64):
            raise _TooLarge("a power is too large")
        if operator == "*":
            for items, times in ((left, right), (right, left)):
                if hasattr(items, "__len__") and isinstance(times, int) and len(items) * times > MAX_OPERAND_ITEMS:
                    raise _TooLarge("a repetition is too long")
        if operator == "+" and hasattr(left, "__len__") and len(left) > MAX_OPERAND_ITEMS:
            raise _TooLarge("a text or list is too long")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: object) -> None:
    raise _RaisedByTemplate(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' templates mean it: characters kept, nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> _Environment:
    env = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return env


class ChatTemplate:
    """One compiled template. Raises ModelError when `source` is not a valid template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None, origin: str = "the model") -> None:
        """`special_tokens` (bos_token, eos_token, ...) are visible to the template by name."""
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        env = _environment()
        try:
            self._template = env.from_string(source)
            self._reads = meta.find_undeclared_variables(env.parse(source))
        except TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template of {origin} has a syntax error in line {error.lineno}: {error.message} "
                "(another one can be given with the option chat_template)"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text. `variables` are extra names that the template reads (enable_thinking ...).

        Raises InvalidParam naming messages, chat_template_kwargs or continue_final_message.
        """
        if not messages:
            raise InvalidParam("messages", "must not be empty")
        self._check_variables(variables or {})
        if continue_final_message:
            if add_generation_prompt:
                raise InvalidParam("continue_final_message", "cannot be used together with add_generation_prompt")
            messages = _marked(messages)
        names = {**self._special_tokens, **(variables or {})}
        names.update(messages=messages, tools=tools or None, add_generation_prompt=add_generation_prompt)
        text = self._rendered(names)
        return _cut(text) if continue_final_message else text

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        for name in variables:
            if name in _RESERVED or name in self._special_tokens:
                raise InvalidParam("chat_template_kwargs", f"{name} cannot be set here")
            if name not in self._reads:
                known = sorted(self._reads - _RESERVED - self._special_tokens.keys())
                raise InvalidParam(
                    "chat_template_kwargs", f"the chat template does not read {name!r}; it reads: {', '.join(known)}"
                )

    def _rendered(self, names: dict[str, Any]) -> str:
        parts: list[str] = []
        num_chars = 0
        try:
            for part in self._template.generate(names):
                num_chars += len(part)
                if num_chars > MAX_RENDERED_CHARS:
                    raise _TooLarge(f"the prompt is longer than {MAX_RENDERED_CHARS} characters")
                parts.append(part)
        except TemplateError as error:
            raise InvalidParam("messages", f"the chat template refused them: {error.message or error}") from error
        # Template code runs on request data: a wrong shape of message surfaces as one of these.
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            raise InvalidParam(
                "messages", f"the chat template cannot render them: {type(error).__name__}: {error}"
            ) from error
        return "".join(parts)


def _marked(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A copy whose last message ends in the mark at which the prompt shall end."""
    content = messages[-1].get("content")
    if isinstance(content, str):
        marked: Any = content + _CUT
    elif isinstance(content, list) and content and isinstance(content[-1], Mapping) and "text" in content[-1]:
        marked = [*content[:-1], {**content[-1], "text": f"{content[-1]['text']}{_CUT}"}]
    else:
        raise InvalidParam("continue_final_message", "the last message has no text to continue")
    return [*messages[:-1], {**messages[-1], "content": marked}]


def _cut(text: str) -> str:
    place = text.rfind(_CUT[:-1])
    if place < 0:
        raise InvalidParam("continue_final_message", "the chat template drops the end of the last message")
    return text[:place] if text.startswith(_CUT, place) else text[:place].rstrip()
