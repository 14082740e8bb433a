"""What a user may ask of the engine (`EngineOptions`) and what it became (`EngineConfig`).

`resolve` in `engine/llm.py` turns one into the other once; nothing downstream sees "auto".
The command line, the YAML file and `LLM(...)` are all generated from these fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from engine.errors import InvalidParam
from engine.model.config import ModelConfig
from engine.model.packing import Packings, Quantization
from pallas_kernels.target import KVDtype, Target
from sharding.shards import WHOLE, Shards

DEFAULT_MODEL = "smollm2-135m-instruct"


def option(default: Any, help: str) -> Any:  # the argparse word
    """A dataclass field that carries its one-line help for the command line."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Requested configuration. None means: chosen from the model and the device."""

    model: str = option(DEFAULT_MODEL, "registry name, GGUF file, Hugging Face or Orbax folder, or hub name")
    tokenizer: str | None = option(None, "folder or GGUF file to take the tokenizer from (default: the model's)")
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    dtype: Literal["auto", "bfloat16", "float32"] = option("auto", "of weights, activations and KV cache")
    max_model_len: int | None = option(None, "longest sequence, prompt and output together, in tokens")
    max_num_seqs: int | None = option(None, "sequences that run at once")
    max_num_batched_tokens: int | None = option(None, "prefill tokens a step")
    tpot_slo_ms: float | None = option(
        None,
        "milliseconds that a running sequence may wait for its next token because of others' prompts: prefill "
        "tokens a step are chosen by the steps' measured times (default: all that fit in the step)",
    )
    page_size: int | None = option(None, "tokens in a page of the KV cache")
    kv_cache_memory_bytes: int | None = option(None, "size of the KV cache in bytes")
    enable_prefix_caching: bool = option(True, "reuse KV pages of equal prompt prefixes")
    state_checkpoints: int | None = option(None, "recurrent states kept beside the pages for prefix reuse")
    kv_cache_dtype: Literal["auto", "int8", "fp8", "fp8_e4m3", "fp8_e5m2"] = option(
        "auto", "of the KV cache; auto is the dtype of the weights, fp8 is fp8_e4m3"
    )
    quantization: Literal["auto", "stored", "none", Quantization] = option(
        "auto",
        "pack the weights while loading: int8 or fp8 with a scale a column, int4 with one a group of rows; w8a8 is "
        "int8 that meets activations in int8, a scale a token, w8a8_32 and w4a8_32 are int8 and int4 that meet them "
        "with a scale for every 32 numbers, for CPUs; stored keeps what the checkpoint has packed, none makes it "
        "float, auto is stored on a TPU or GPU, and on a CPU for 4-bit matrices that compiled kernels multiply by",
    )
    quantize_lm_head: bool = option(
        False,
        "pack the LM head too, in 8 bits with a scale a token of the vocabulary; one that is tied to the embeddings "
        "then stands beside them",
    )
    sharding: str = option("single", "how the model is cut over the devices: a name in configs/sharding or a YAML file")
    kernel: tuple[str, ...] = option((), "an op's implementation by name, as op=implementation; without fallback")
    decode_steps: int | None = option(
        None, "tokens a sequence decodes in one device call (default: by load, as many as a short call holds)"
    )
    speculation: Literal["none", "ngram", "draft"] = option(
        "none",
        "propose tokens and verify several at once: ngram from the sequence's own text, draft by a second model; the "
        "output stays the same",
    )
    draft_model: str | None = option(
        None, "a smaller model with the same vocabulary that proposes tokens, named as the model is"
    )
    draft_tokens: int | None = option(None, "tokens that speculation proposes at once")
    overlap: bool = option(True, "launch a step before the tokens of the last one are read")
    max_queued_requests: int = option(1024, "requests that may wait; more are answered with 429")
    task: Literal["auto", "generate", "embed", "score"] = option(
        "auto", "what a model is served for; auto goes by its architecture and its files"
    )
    pooling: Literal["cls", "mean", "last"] | None = option(
        None, "how a text's tokens become its embedding (default: as the model's files say)"
    )
    normalize: bool | None = option(None, "embeddings of length one (default: as the model's files say)")
    is_matryoshka: bool = option(False, "the model was trained so that requests may cut embeddings to `dimensions`")
    skip_tokenizer_init: bool = option(False, "token ids in and out, no text")
    chat_template: str | None = option(None, "file with a Jinja chat template (default: the model's)")
    seed: int = option(0, "base for the seeds of requests that bring none")
    cache_dir: str | None = option(None, "for downloads and compiled programs (default: the user's cache folder)")
    compile_cache: bool = option(True, "keep compiled programs on disk")
    programs: str | None = option(
        None, "folder of programs that octavo compile wrote (default: the one beside the checkpoint, where it fits)"
    )

    def __post_init__(self) -> None:
        for name in ("model", "draft_model"):
            if getattr(self, name) == "":
                raise InvalidParam(name, "must not be empty")
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "page_size",
                     "kv_cache_memory_bytes", "decode_steps", "draft_tokens", "max_queued_requests"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidParam(name, f"must be a positive integer, got {value!r}")
        slo_ms = self.tpot_slo_ms
        if slo_ms is not None and (isinstance(slo_ms, bool) or not isinstance(slo_ms, (int, float)) or not slo_ms > 0):
            raise InvalidParam("tpot_slo_ms", f"must be a positive number, got {slo_ms!r}")
        count = self.state_checkpoints
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
            raise InvalidParam("state_checkpoints", f"must be an integer of 0 or more, got {count!r}")
        for name in ("dtype", "kv_cache_dtype", "quantization", "task", "speculation"):
            known = get_args(get_type_hints(EngineOptions)[name])
            if getattr(self, name) not in known:
                raise InvalidParam(name, f"must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.pooling not in (None, "cls", "mean", "last"):
            raise InvalidParam("pooling", f"must be one of cls, mean, last, got {self.pooling!r}")


@dataclass(frozen=True)
class Draft:
    """A model that proposes tokens, and what of the configuration is its own."""

    model: ModelConfig
    dtype: Literal["bfloat16", "float32"]
    kv_cache_dtype: KVDtype
    stored: Packings
    shards: Shards  # over the same mesh


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Concrete configuration: every number that shapes a program or bounds a queue."""

    dtype: Literal["bfloat16", "float32"]
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_prefill_rows: int  # prompts (or chunks) that one prefill step may hold
    kv_cache_dtype: KVDtype
    quantization: Quantization | None  # what weights are packed into while loading
    target: Target  # what the programs are compiled for
    page_size: int  # of a whole page, where its tokens are spread over devices
    num_pages: int  # page 0 is the trash page: written by idle rows, read by none
    decode_steps: int  # the most of a call
    token_buckets: tuple[int, ...]  # prefill tokens a step, ascending
    prefill_decode_buckets: tuple[int, ...]  # decode rows riding in a prefill step, ascending from 0
    decode_buckets: tuple[int, ...]  # rows of a decode step, ascending
    enable_prefix_caching: bool
    overlap: bool
    max_queued_requests: int
    seed: int
    stored: Packings = ()  # parameters that stay as the checkpoint has them packed
    shards: Shards = WHOLE  # what is cut over which devices
    packed_head: bool = False  # the LM head is packed, too
    in_panels: bool = False  # weights lie as compiled CPU kernels read them fastest
    fewest_decode_steps: int = 1  # where the call's length goes by load
    decode_call_s: float | None = None  # that a call should take at most; None: every one has decode_steps
    tpot_slo_s: float | None = None  # that prompts may keep running sequences from their next token
    draft_tokens: int = 0  # proposed for each row of a decode step; 0: no speculation
    draft: Draft | None = None  # what proposes them; None: the sequence's own text
    state_checkpoints: int | None = None  # recurrent states kept for prefix reuse; None: no layer has a state

    @property
    def max_pages_per_seq(self) -> int:
        return -(-self.max_model_len // self.page_size)

    @property
    def num_groups(self) -> int:
        """Groups of requests; all numbers here are of one of them."""
        return self.shards.num_groups

    @property
    def laid_for(self) -> Target | None:
        """Whose kernels weights are laid out for; None: they lie as they are declared."""
        return self.target if self.in_panels or self.target.platform != "cpu" else None

    def most_steps(self, drafts: int) -> int:
        """Tokens that a row of a decode step may draw: with proposed ones, all of those and one more."""
        return drafts + 1 if drafts else self.decode_steps

    def of_draft(self, draft: Draft) -> EngineConfig:
        """The configuration of the draft model as if it were alone: pages are as many and as long."""
        return replace(
            self,
            draft=None,
            dtype=draft.dtype,
            kv_cache_dtype=draft.kv_cache_dtype,
            stored=draft.stored,
            packed_head=False,
            shards=draft.shards,
        )

    @property
    def chains_steps(self) -> bool:
        """Whether the steps of a decoding call follow each other through stages without a gap (`engine.chained`)."""
        return self.shards.count("layers") > 1 and self.decode_steps > 1

    @property
    def part_size(self) -> int:
        """Tokens of a page on one device."""
        return self.page_size // self.shards.count("sequence")

    @property
    def num_states(self) -> int:
        """Rows of a recurrent layer's pool: one a slot, the idle slot's, and the checkpoints."""
        return 0 if self.state_checkpoints is None else self.max_num_seqs + 1 + self.state_checkpoints

    @property
    def checkpoint_rows(self) -> range | None:
        """The rows of the pool that are checkpoints; None: no layer has a state."""
        return None if self.state_checkpoints is None else range(self.max_num_seqs + 1, self.num_states)

    def summary(self) -> str:
        """Every field, on one line."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["stored"] = f"{len(self.stored)} weights"
        if self.draft is not None:
            fields["draft"] = f"{self.draft.model.family} of {self.draft.model.num_layers} layers in {self.draft.dtype}"
        return ", ".join(f"{name} {value}" for name, value in fields.items())


def options_from_dict(cls: type, values: dict[str, Any]) -> Any:
    """An options dataclass from plain data. An unknown name is an error with the nearest one."""
    known = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InvalidParam(name, f"is not an option of {cls.__name__}{hint}")
    return cls(**values)


def cache_root(cache_dir: str | None = None) -> Path:
    """Folder for downloads and compiled programs: the option, $OCTAVO_CACHE_DIR, or the XDG cache."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    if os.environ.get("OCTAVO_CACHE_DIR"):
        return Path(os.environ["OCTAVO_CACHE_DIR"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "octavo"
