"""Tiny tokenizers that can be checked by hand: byte-level BPE, SentencePiece-like BPE, and GGUF files of both."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from engine.text import Tokenizer, load_tokenizer
from engine.text.pretokenizers import PRE_TOKENIZERS

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CORPUS = ["the quick brown fox jumps over the lazy dog; the end", "don't we'll 12345 über straße naïve",
          "hello world hello there", "日本語 日本 👩‍👩‍👧 emoji"] * 4  # fmt: skip
SPM_WORDS = ["▁hello", "▁world", "llo", "lo", "he", "▁the", "th", "▁w", "or", "ld", "orld", "▁a", "▁b", "ab", "ll"]


@functools.cache
def byte_level_json(pre: str = "gpt-2") -> str:
    """tokenizer.json of a byte-level BPE with 3 special tokens and a few hundred merges."""
    backend = Backend(models.BPE())
    splits: list[Any] = [pre_tokenizers.Split(Regex(p), "isolated") for p in PRE_TOKENIZERS[pre].patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend.to_str()


def spm_vocab() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types as SentencePiece writes them; later merges have lower scores."""
    specials = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *SPM_WORDS, *"▁abcdefghijklmnopqrstuvwxyz.é"]
    tokens = [token for token, _ in specials] + pieces
    types = [kind for _, kind in specials] + [6] * 256 + [1] * (len(pieces) - 256)
    scores = [0.0] * (3 + 256) + [-float(i // 2) for i in range(len(pieces) - 256)]  # ties too
    return tokens, scores, types


def write_hf_folder(folder: Path, tokenizer_json: str, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def byte_level(folder: Path) -> Tokenizer:
    config = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}, "chat_template": TEMPLATE}
    return load_tokenizer(write_hf_folder(folder, byte_level_json(), **config))


def byte_level_gguf(path: Path, pre: str = "gpt-2", **extra: Any) -> Path:
    state = json.loads(byte_level_json(pre if pre in PRE_TOKENIZERS else "gpt-2"))
    vocab = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    writer = _writer(path, "gpt2", pre, vocab, [3 if token in SPECIALS else 1 for token in vocab])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_eos_token_id(vocab.index("<|im_end|>"))
    writer.add_bos_token_id(vocab.index("<|im_start|>"))
    writer.add_chat_template(TEMPLATE)
    return _finish(writer, path, extra)


def spm_gguf(path: Path, model: str = "llama", **extra: Any) -> Path:
    tokens, scores, types = spm_vocab()
    writer = _writer(path, model, "default", tokens, types)
    writer.add_token_scores(scores)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return _finish(writer, path, extra)


def _writer(path: Path, model: str, pre: str, tokens: list[str], types: list[int]) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    return writer


def _finish(writer: gguf.GGUFWriter, path: Path, extra: dict[str, Any]) -> Path:
    for key, value in extra.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_fallback_backend() -> Backend:
    """The SentencePiece vocabulary as transformers' converter would build it."""
    tokens, _, _ = spm_vocab()
    backend = Backend(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], byte_fallback=True,
                                 unk_token="<unk>"))  # fmt: skip
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend
