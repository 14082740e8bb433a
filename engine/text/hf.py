"""A tokenizer from a Hugging Face folder: tokenizer.json and the small files beside it.

Reads no model code and runs none. Every problem is a ModelError that names the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from engine.errors import ModelError
from engine.text.tokenizer import Tokenizer, TokenizerParts

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Tokenizer classes of transformers that build their post-processor from add_bos_token and add_eos_token.
_CLASSES_WITH_ADD_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")


def load_hf_tokenizer(folder: Path, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of `folder`; `chat_template` (Jinja source) replaces the model's own."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        hint = ""
        if (folder / "tokenizer.model").is_file():
            hint = "; there is a SentencePiece tokenizer.model, which must be converted (transformers' save_pretrained)"
        raise ModelError(f"{folder} has no tokenizer.json{hint}")
    config = _read_object(folder / "tokenizer_config.json")
    backend = _load_backend(path)
    _add_missing_tokens(backend, config, folder)
    special = _special_tokens(folder, config)
    _apply_add_bos(backend, config, special)
    templates = {"default": chat_template} if chat_template is not None else _chat_templates(folder, config)
    parts = TokenizerParts(
        special_tokens=special,
        end_token_ids=_end_token_ids(folder, backend, special),
        chat_templates=templates,
        origin=str(folder) if chat_template is None else "the option chat_template",
    )
    return Tokenizer(backend, parts)


def _load_backend(path: Path) -> Backend:
    text = _read_text(path)
    try:
        return Backend.from_str(text)
    except Exception as error:  # the library raises bare Exception for any fault in the file
        raise ModelError(f"{path} is not a tokenizer that the tokenizers library can read: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value


def _spelling(value: Any) -> str | None:
    """A special token is a string, or an object with `content`, or null."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Role to spelling; tokenizer_config.json wins over special_tokens_map.json."""
    table = _read_object(folder / "special_tokens_map.json")
    found: dict[str, str] = {}
    for role in _ROLES:
        spelling = _spelling(config.get(role)) or _spelling(table.get(role))
        if spelling is not None:
            found[role] = spelling
    return found


def _add_missing_tokens(backend: Backend, config: dict[str, Any], folder: Path) -> None:
    """Added tokens that stand in tokenizer_config.json alone (older folders)."""
    entries = config.get("added_tokens_decoder") or {}
    try:
        wanted = sorted((int(token_id), entry) for token_id, entry in entries.items())
        for token_id, entry in wanted:
            if backend.token_to_id(entry["content"]) is not None:
                continue
            flags = {flag: bool(entry.get(flag, False)) for flag in ("lstrip", "rstrip", "single_word")}
            special = bool(entry.get("special", False))
            token = AddedToken(entry["content"], normalized=bool(entry.get("normalized", not special)), **flags)
            (backend.add_special_tokens if special else backend.add_tokens)([token])
            if backend.token_to_id(entry["content"]) != token_id:
                raise ModelError(f"{folder}: added token {entry['content']!r} cannot have id {token_id}")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{folder}/tokenizer_config.json: added_tokens_decoder is malformed: {error!r}") from error


def _apply_add_bos(backend: Backend, config: dict[str, Any], special: dict[str, str]) -> None:
    """Llama-like classes say in tokenizer_config.json what is put around a text; that wins."""
    if str(config.get("tokenizer_class", "")).removesuffix("Fast") not in _CLASSES_WITH_ADD_BOS:
        return
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    add_bos = config.get("add_bos_token", True)
    add_eos = config.get("add_eos_token", False)
    set_affixes(backend, special.get("bos_token") if add_bos else None, special.get("eos_token") if add_eos else None)


def set_affixes(backend: Backend, bos: str | None, eos: str | None) -> None:
    """Put `bos` before and `eos` after every text that is encoded with add_special_tokens."""
    affixes = [token for token in (bos, eos) if token is not None and backend.token_to_id(token) is not None]
    single = [f"{bos}:0"] if bos in affixes else []
    single.append("$A:0")
    if eos in affixes:
        single.append(f"{eos}:0")
    backend.post_processor = TemplateProcessing(
        single=single,
        pair=[*single, "$B:1"],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(affixes)],
    )


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Name to Jinja source. Files win over tokenizer_config.json."""
    value = config.get("chat_template")
    if not value:
        value = _read_object(folder / "chat_template.json").get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(value, str):
        templates["default"] = value
    elif isinstance(value, list):
        for entry in value:
            if not isinstance(entry, dict) or not isinstance(entry.get("template"), str):
                raise ModelError(f"{folder}/tokenizer_config.json: chat_template must be a string or a list of "
                                 "objects with name and template")  # fmt: skip
            templates[str(entry.get("name"))] = entry["template"]
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = _read_text(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _read_text(path)
    # The others are for other programs (rag, ...), and need not compile here.
    return {name: source for name, source in templates.items() if name in ("default", "tool_use")}


def _end_token_ids(folder: Path, backend: Backend, special: dict[str, str]) -> tuple[int, ...]:
    """eos of the tokenizer, and of generation_config.json (or else config.json)."""
    found: set[int] = set()
    if "eos_token" in special:
        token_id = backend.token_to_id(special["eos_token"])
        found |= set() if token_id is None else {token_id}
    for name in ("generation_config.json", "config.json"):
        value = _read_object(folder / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
            raise ModelError(f"{folder / name}: eos_token_id must be token ids, got {value!r}")
        found |= set(ids)
        break
    return tuple(sorted(found))
