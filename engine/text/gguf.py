"""A tokenizer from GGUF metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama").

Matches llama.cpp's meaning of the metadata. Knows nothing about weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from engine.errors import ModelError
from engine.model.gguf_file import GgufFile
from engine.text.hf import set_affixes
from engine.text.pretokenizers import PRE_TOKENIZERS
from engine.text.tokenizer import Tokenizer, TokenizerParts

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Control tokens that end a turn in some model; files often name only one of them as eos.
_END_SPELLINGS = frozenset({
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
    "<|return|>", "<|call|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<EOT>",
})  # fmt: skip


def gguf_tokenizer(file: GgufFile, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer in `file`'s metadata; `chat_template` (Jinja source) replaces the model's own.

    Raises ModelError that names the tokenizer model or pre-tokenizer when it is not known.
    """
    vocab = _Vocab(file)
    kind = vocab.get("model", str)
    if kind not in _BUILDERS:
        raise file.fail(f"tokenizer.ggml.model {kind!r} is not supported; known: {', '.join(_BUILDERS)}")
    backend, add_bos = _BUILDERS[kind](vocab)
    _add_special_tokens(backend, vocab, kind)
    special = vocab.special_tokens()
    bos = special.get("bos_token") if vocab.get("add_bos_token", bool, add_bos) else None
    eos = special.get("eos_token") if vocab.get("add_eos_token", bool, False) else None
    if bos or eos:
        set_affixes(backend, bos, eos)
    templates = {"default": chat_template} if chat_template is not None else _chat_templates(file)
    origin = str(file.path) if chat_template is None else "the option chat_template"
    return Tokenizer(backend, TokenizerParts(special, vocab.end_token_ids(), templates, origin))


class _Vocab:
    """Checked access to the tokenizer.ggml.* keys."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.tokens: list[str] = self._strings("tokens")
        self.types: list[int] = file.metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(self.tokens)
        if not self.tokens:
            raise file.fail("tokenizer.ggml.tokens is empty")
        if not isinstance(self.types, list) or len(self.types) != len(self.tokens):
            raise file.fail(f"tokenizer.ggml.token_type must have one entry for each of the {len(self.tokens)} tokens")
        self.ids: dict[str, int] = {}
        for token_id, token in enumerate(self.tokens):
            self.ids.setdefault(token, token_id)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.file.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind):
            raise self.file.fail(f"tokenizer.ggml.{key} must be {kind.__name__}, got {str(value)[:80]!r}")
        return value

    def _strings(self, key: str) -> list[str]:
        value = self.get(key, list)
        if value and not isinstance(value[0], str):
            raise self.file.fail(f"tokenizer.ggml.{key} must hold strings")
        return value

    def merges(self) -> list[tuple[str, str]]:
        """A merge is "left right"; a part may begin with a space, so the cut is after the first character."""
        pairs: list[tuple[str, str]] = []
        for merge in self._strings("merges"):
            cut = merge.find(" ", 1)
            if cut < 0:
                raise self.file.fail(f"tokenizer.ggml.merges has an entry of one part: {merge!r}")
            pairs.append((merge[:cut], merge[cut + 1 :]))
        return pairs

    def merges_from_scores(self) -> list[tuple[str, str]]:
        """SentencePiece keeps a score per token, the best merged first: every split of it is a merge."""
        scores = self.get("scores", list)
        if len(scores) != len(self.tokens):
            raise self.file.fail(f"tokenizer.ggml.scores must have one entry for each of the {len(self.tokens)} tokens")
        usable = {
            token: scores[token_id]
            for token, token_id in self.ids.items()
            if self.types[token_id] in (_NORMAL, _USER_DEFINED)
        }
        merges = [
            (-score, token[:cut], token[cut:])
            for token, score in usable.items()
            for cut in range(1, len(token))
            if token[:cut] in usable and token[cut:] in usable
        ]
        merges.sort(key=lambda merge: merge[0])
        return [(left, right) for _, left, right in merges]

    def special_tokens(self) -> dict[str, str]:
        found = {}
        for role, key in _ROLES.items():
            token_id = self.file.metadata.get(f"tokenizer.ggml.{key}")
            if isinstance(token_id, int) and 0 <= token_id < len(self.tokens):
                found[role] = self.tokens[token_id]
        return found

    def end_token_ids(self) -> tuple[int, ...]:
        named = [self.file.metadata.get(f"tokenizer.ggml.{key}") for key in _END_KEYS]
        found = {token_id for token_id in named if isinstance(token_id, int) and 0 <= token_id < len(self.tokens)}
        spelled = (self.ids.get(spelling) for spelling in _END_SPELLINGS)
        found |= {token_id for token_id in spelled if token_id is not None and self.types[token_id] == _CONTROL}
        return tuple(sorted(found))


def _bpe(vocab: _Vocab) -> tuple[Backend, bool]:
    """Byte-level BPE. Returns the backend and whether bos is added when the file does not say."""
    name = vocab.get("pre", str, "default")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        raise vocab.file.fail(f"tokenizer.ggml.pre {name!r} is not supported; known: {', '.join(PRE_TOKENIZERS)}")
    backend = Backend(_model(vocab, vocab.merges(), ignore_merges=pre.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(vocab: _Vocab) -> tuple[Backend, bool]:
    unknown = next((t for t, kind in zip(vocab.tokens, vocab.types, strict=True) if kind == _UNKNOWN), None)
    backend = Backend(_model(vocab, vocab.merges_from_scores(), byte_fallback=True, fuse_unk=True, unk_token=unknown))
    space_prefix = vocab.get("add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if space_prefix else spaces
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend, True


_BUILDERS = {"gpt2": _bpe, "llama": _sentencepiece}


def _model(vocab: _Vocab, merges: list[tuple[str, str]], **options: Any) -> models.BPE:
    try:
        return models.BPE(vocab=vocab.ids, merges=merges, **options)
    except Exception as error:  # the library raises bare Exception, for example for a merge of no token
        raise vocab.file.fail(f"the tokenizer's merges do not fit its tokens: {error}") from error


def _add_special_tokens(backend: Backend, vocab: _Vocab, kind: str) -> None:
    """Control and unknown tokens are special (skipped in text); user-defined ones are only matched whole."""
    # Phi-3's turn markers swallow the spaces and newlines after them; GGUF has no field for that.
    strips = kind == "llama" and vocab.file.metadata.get("general.architecture") == "phi3"
    keeps_spaces = {"<unk>", "<s>", "<|endoftext|>"}

    def added(wanted: Iterable[int], special: bool) -> list[AddedToken]:
        tokens = [t for t, kind in zip(vocab.tokens, vocab.types, strict=True) if kind in wanted and t]
        return [
            AddedToken(t, normalized=False, special=special, rstrip=strips and special and t not in keeps_spaces)
            for t in tokens
        ]

    backend.add_special_tokens(added((_CONTROL, _UNKNOWN), True))
    backend.add_tokens(added((_USER_DEFINED,), False))


def _chat_templates(file: GgufFile) -> dict[str, str]:
    keys = {"default": "tokenizer.chat_template", "tool_use": "tokenizer.chat_template.tool_use"}
    found = {name: file.metadata[key] for name, key in keys.items() if key in file.metadata}
    for name, source in found.items():
        if not isinstance(source, str):
            raise ModelError(f"{file.path}: {keys[name]} must be a string")
    return found
