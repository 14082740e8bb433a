"""Text at the border of the engine: tokenizers, chat templates, token streams to text.

Knows token ids and strings; nothing about devices, scheduling or HTTP.
"""

from __future__ import annotations

from pathlib import Path

from engine.errors import ModelError
from engine.model.gguf_file import read_gguf
from engine.text.gguf import gguf_tokenizer
from engine.text.hf import load_hf_tokenizer
from engine.text.stream import TextStream
from engine.text.template import ChatTemplate
from engine.text.tokenizer import Tokenizer, TokenizerParts

__all__ = ["ChatTemplate", "TextStream", "Tokenizer", "TokenizerParts", "load_tokenizer"]


def load_tokenizer(source: Path, chat_template: Path | None = None) -> Tokenizer:
    """The tokenizer of a GGUF file or of a folder with tokenizer.json.

    `chat_template` is a file with a Jinja template that replaces the model's own. Raises ModelError.
    """
    template = _read_template(chat_template) if chat_template is not None else None
    if source.is_dir():
        return load_hf_tokenizer(source, template)
    if source.is_file():
        return gguf_tokenizer(read_gguf(source), template)
    raise ModelError(f"there is no tokenizer at {source}: it is neither a folder nor a GGUF file")


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"the chat template {path} cannot be read: {error}") from error
