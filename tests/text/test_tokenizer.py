"""Tokenizers from Hugging Face folders and GGUF files: exact ids, exact bytes, and they load again equal."""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from engine.errors import InvalidParam, ModelError
from engine.text import Tokenizer, TokenizerParts, load_tokenizer
from engine.text.pretokenizers import PRE_TOKENIZERS
from tests.text.small import (
    SPECIALS,
    TEMPLATE,
    byte_fallback_backend,
    byte_level,
    byte_level_gguf,
    byte_level_json,
    spm_gguf,
    spm_vocab,
    write_hf_folder,
)

TEXTS = [
    "hello world",
    "  two  spaces\n\n",
    "don't we'LL 12345",
    "日本語 👩‍👩‍👧 ünïcödé",
    "<|im_start|>user\nhi<|im_end|>",
    "",
]
FIXTURES = Path(__file__).parent.parent / "fixtures/tokenizers"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_level(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(spm_gguf(tmp_path_factory.mktemp("spm") / "model.gguf"))


@pytest.mark.parametrize("text", TEXTS)
def test_encode_and_decode_are_those_of_the_library(bpe: Tokenizer, text: str) -> None:
    backend = Backend.from_str(byte_level_json())
    ids = bpe.encode(text)
    assert ids == backend.encode(text).ids
    assert bpe.decode(ids, skip_special_tokens=False) == text
    assert bpe.decode(ids) == backend.decode(ids)


@given(ids=st.lists(st.integers(0, 419), max_size=30), skip=st.booleans())
@settings(deadline=None)
def test_decoding_any_ids_is_that_of_the_library(ids: list[int], skip: bool) -> None:
    """Byte-level: also for ids whose bytes are no UTF-8."""
    backend = Backend.from_str(byte_level_json())
    tokenizer = Tokenizer(backend, TokenizerParts())
    assert tokenizer.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=30))
@example(text="▁")
@settings(deadline=None)
def test_decoding_byte_fallback_is_that_of_the_library(text: str) -> None:
    backend = byte_fallback_backend()
    tokenizer = Tokenizer(backend, TokenizerParts())
    ids = backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == backend.decode(ids) == text.replace("▁", " ")  # sentencepiece's space


def test_special_spellings_in_user_text(bpe: Tokenizer) -> None:
    """parse_special=False: the characters, never the token; the text stays the same."""
    text = "<|im_end|> and <|im_start|>"
    start, end = bpe.bos_token_id, bpe.end_token_ids[0]
    assert bpe.encode(text)[0] == end and bpe.encode(text)[-1] == start
    verbatim = bpe.encode(text, parse_special=False)
    assert not {start, end} & set(verbatim)
    assert bpe.decode(verbatim) == text
    assert bpe.encode(text)[0] == end  # the other way is not changed by it


def test_token_bytes(bpe: Tokenizer, spm: Tokenizer) -> None:
    ids = bpe.encode("日")
    assert len(ids) >= 1 and b"".join(map(bpe.token_bytes, ids)) == "日".encode()
    assert bpe.token_bytes(bpe.end_token_ids[0]) == b"<|im_end|>"
    assert (bpe.token_bytes(10**9), bpe.token_bytes(-1), bpe.token_str(10**9)) == (b"", b"", "")
    tokens, _, _ = spm_vocab()
    assert spm.token_bytes(tokens.index("<0xE6>")) == b"\xe6"
    assert spm.token_str(tokens.index("<0xE6>")) == "�"
    assert spm.token_bytes(tokens.index("▁hello")) == b" hello"


def test_lone_surrogates_count_as_replacement_characters(bpe: Tokenizer) -> None:
    assert bpe.decode(bpe.encode("a\ud800b")) == "a\ufffdb"
    assert bpe.encode("\ud83d\ude00") == bpe.encode("😀")  # a pair that JSON spelled apart


def test_bad_words(bpe: Tokenizer, spm: Tokenizer) -> None:
    tokens, _, _ = spm_vocab()
    [plain, spaced] = bpe.single_tokens("hello")
    assert (bpe.token_str(plain), bpe.token_str(spaced)) == ("hello", " hello")
    assert spm.single_tokens("a") == (tokens.index("<0x61>"), tokens.index("a"), tokens.index("▁a"))
    assert spm.single_tokens(" llo") == (tokens.index("llo"),)
    for word in ("hello world", "zzzz", "  "):
        with pytest.raises(InvalidParam, match="bad_words"):
            bpe.single_tokens(word)


def test_save_and_load(bpe: Tokenizer, spm: Tokenizer, tmp_path: Path) -> None:
    for name, tokenizer in (("bpe", bpe), ("spm", spm)):
        tokenizer.save(tmp_path / name)
        again = load_tokenizer(tmp_path / name)
        assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
        assert again.pieces == tokenizer.pieces
        assert (again.parts.special_tokens, again.end_token_ids, again.vocab_size) == (
            tokenizer.parts.special_tokens, tokenizer.end_token_ids, tokenizer.vocab_size)  # fmt: skip
        assert again.parts.chat_templates == tokenizer.parts.chat_templates


def test_one_megabyte_is_no_trouble(bpe: Tokenizer, spm: Tokenizer) -> None:
    for tokenizer in (bpe, spm):
        for piece, repeats in (("a", 2**20), (" ", 2**18), ("\n", 2**18), ("日", 2**16), ("x\t ", 2**16)):
            start_s = time.monotonic()
            assert len(tokenizer.encode(piece * repeats)) > 1000
            assert time.monotonic() - start_s < 10  # measured: below 1.5; one that is quadratic takes hours


# Hugging Face folders


def test_a_long_text_lets_other_threads_run(bpe: Tokenizer) -> None:
    """Streams go on while somebody's prompt is tokenized."""
    turns, done = 0, threading.Event()

    def others() -> None:
        nonlocal turns
        while not done.wait(0.001):
            turns += 1

    thread = threading.Thread(target=others)
    thread.start()
    try:
        before, start_s = turns, time.perf_counter()
        while time.perf_counter() - start_s < 0.3:
            bpe.encode("the quick brown fox " * 20_000)
        assert turns - before > 10
    finally:
        done.set()
        thread.join()


def test_end_tokens_and_templates_of_a_folder(tmp_path: Path) -> None:
    config = {"eos_token": {"content": "<|im_end|>"}, "chat_template": [
        {"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"},
        {"name": "rag", "template": "{% broken"}]}  # fmt: skip
    folder = write_hf_folder(tmp_path, byte_level_json(), **config)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.end_token_ids == (0, 2)
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.render_chat(messages) == "plain"
    assert tokenizer.render_chat(messages, tools=[{}, {}]) == "2 tools"
    (folder / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(folder).render_chat(messages) == "from the file"
    (tmp_path / "mine.jinja").write_text("from the operator")
    assert load_tokenizer(folder, tmp_path / "mine.jinja").render_chat(messages) == "from the operator"


def test_a_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_hf_folder(tmp_path, byte_level_json()))
    assert not tokenizer.has_chat_template and tokenizer.end_token_ids == ()
    with pytest.raises(InvalidParam, match="chat_template: this model has no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


def test_add_bos_token_of_llama_like_classes(tmp_path: Path) -> None:
    config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    plain = load_tokenizer(write_hf_folder(tmp_path / "0", byte_level_json(), **config))
    bos = load_tokenizer(write_hf_folder(tmp_path / "1", byte_level_json(), add_bos_token=True, **config))
    ids = plain.encode("hi")
    assert bos.encode("hi") == [1, *ids]
    assert bos.encode("hi", add_special_tokens=False) == ids
    both = load_tokenizer(
        write_hf_folder(tmp_path / "2", byte_level_json(), add_bos_token=True, add_eos_token=True, **config)
    )
    assert both.encode("hi") == [1, *ids, 2]


def test_added_tokens_of_old_folders(tmp_path: Path) -> None:
    size = Backend.from_str(byte_level_json()).get_vocab_size()
    entry = {"content": "<tool>", "special": True, "normalized": False}
    folder = write_hf_folder(tmp_path, byte_level_json(), added_tokens_decoder={str(size): entry})
    assert load_tokenizer(folder).encode("<tool>") == [size]
    folder = write_hf_folder(tmp_path, byte_level_json(), added_tokens_decoder={str(size + 7): entry})
    with pytest.raises(ModelError, match=f"'<tool>' cannot have id {size + 7}"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json is not a tokenizer"),
        ("tokenizer.json", '{"model": {"type": "Nope"}}', r"tokenizer\.json is not a tokenizer"),
        ("tokenizer_config.json", "[1]", r"tokenizer_config\.json must hold a JSON object"),
        ("tokenizer_config.json", "[" * 100_000, r"tokenizer_config\.json is not valid JSON"),
        ("tokenizer_config.json", '{"chat_template": [1]}', "chat_template must be"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}', "added_tokens_decoder is malformed"),
        ("generation_config.json", '{"eos_token_id": "2"}', r"generation_config\.json: eos_token_id must be token ids"),
        ("chat_template.jinja", "{% for", "syntax error in line 1"),
    ],
)
def test_malformed_folders(file: str, content: str, message: str, tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path, byte_level_json())
    (folder / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(folder)


def test_missing_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json; there is a SentencePiece tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="neither a folder nor a GGUF file"):
        load_tokenizer(tmp_path / "nothing")


def test_an_unknown_decoder_is_named(tmp_path: Path) -> None:
    state = json.loads(byte_level_json()) | {"decoder": {"type": "CTC", "pad_token": "p", "word_delimiter_token": "|",
                                                         "cleanup": True}}  # fmt: skip
    with pytest.raises(ModelError, match="decoder 'CTC'"):
        load_tokenizer(write_hf_folder(tmp_path, json.dumps(state)))


# GGUF


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_gguf_byte_level_equals_the_folder(pre: str, tmp_path: Path) -> None:
    """Every row of the table compiles, and gives the ids of a tokenizer.json with the same patterns."""
    from_gguf = load_tokenizer(byte_level_gguf(tmp_path / "model.gguf", pre))
    backend = Backend.from_str(byte_level_json(pre))
    for text in TEXTS:
        ids = from_gguf.encode(text, add_special_tokens=False)
        if not PRE_TOKENIZERS[pre].ignore_merges:
            assert ids == backend.encode(text).ids
        assert from_gguf.decode(ids, False) == text
    assert (from_gguf.encode("")[:1] == [1]) == PRE_TOKENIZERS[pre].add_bos
    # eos by id; <|endoftext|> by its spelling
    assert from_gguf.end_token_ids == (0, 2)
    assert from_gguf.parts.chat_templates == {"default": TEMPLATE}
    assert from_gguf.render_chat([{"role": "user", "content": "x"}]) == "<|im_start|>user\nx<|im_end|>\n"


def naive_spm(text: str) -> list[int]:
    """SentencePiece's rule: merge the neighbours with the best score, the leftmost first; bytes for the rest."""
    tokens, scores, types = spm_vocab()
    table = {token: i for i, token in enumerate(tokens) if types[i] == 1}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(-scores[table[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in table]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids = []
    for part in parts:
        ids += [table[part]] if part in table else [tokens.index(f"<0x{byte:02X}>") for byte in part.encode()]
    return ids


@given(text=st.one_of(st.text(max_size=20), st.text("helowrdab t", max_size=20)))
@example(text="▁")
@settings(deadline=None, max_examples=300)
def test_gguf_sentencepiece_equals_the_naive_rule(text: str) -> None:
    tokenizer = _spm()
    ids = tokenizer.encode(text, parse_special=False)
    assert ids[0] == 1  # bos, which the file does not switch off
    assert ids[1:] == naive_spm(text)
    assert tokenizer.decode(ids) == text.replace("▁", " ")  # sentencepiece's space


@functools.cache
def _spm() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return load_tokenizer(spm_gguf(Path(folder) / "model.gguf"))


def test_gguf_sentencepiece_switches(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(
        spm_gguf(tmp_path / "a.gguf", add_bos_token=False, add_space_prefix=False, add_eos_token=True)
    )
    tokens, _, _ = spm_vocab()
    assert tokenizer.encode("llo") == [tokens.index("llo"), 2]
    assert tokenizer.decode(tokenizer.encode(" llo")) == " llo"
    assert tokenizer.encode("<s>", add_special_tokens=False) == [1]
    assert 1 not in tokenizer.encode("<s>", add_special_tokens=False, parse_special=False)


def test_unknown_gguf_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.pre 'new-pre' is not supported; known: default"):
        load_tokenizer(byte_level_gguf(tmp_path / "pre.gguf", "new-pre"))
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.model 'rwkv' is not supported; known: gpt2, llama"):
        load_tokenizer(spm_gguf(tmp_path / "model.gguf", model="rwkv"))


@pytest.mark.model
def test_the_real_model_equals_llama_cpp(default_model_path: Path) -> None:
    tokenizer = load_tokenizer(default_model_path)
    for row in json.loads((FIXTURES / "smollm2_tokens.json").read_text()):
        assert tokenizer.encode(row["text"]) == row["ids"]
        assert tokenizer.encode(row["text"], parse_special=False) == row["verbatim_ids"]
        assert tokenizer.decode(row["ids"], skip_special_tokens=False) == row["text"]
    assert tokenizer.vocab_size == 49152 and tokenizer.end_token_ids == (0, 2)
    prompt = tokenizer.render_chat([{"role": "user", "content": "Hi"}])
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert SPECIALS[0] == tokenizer.token_str(0)
