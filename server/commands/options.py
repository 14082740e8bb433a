"""Options that belong to the command line alone, and help for `SamplingParams` as flags.

Imported to print help, so it stays light: no JAX, no server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from engine.config import option
from engine.errors import InvalidParam
from engine.model.packing import Quantization


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    prompt: str = option("", "text to continue")
    chat: bool = option(False, "put the prompt through the chat template, as a user's message")

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InvalidParam("prompt", "must not be empty")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    system: str | None = option(None, "system message at the head of the conversation")


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    input: str = option("", "JSONL file of requests in OpenAI's batch format")
    output: str = option("", "JSONL file of results; if it exists, the run goes on where it ended")
    max_in_flight: int | None = option(None, "requests handed to the engine at once (default: twice max_num_seqs)")
    served_model_name: str | None = option(None, "name that request bodies use (default: the model's)")
    progress: bool = option(True, "show a progress bar")

    def __post_init__(self) -> None:
        for name in ("input", "output"):
            if not getattr(self, name):
                raise InvalidParam(name, "name a file")
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise InvalidParam("max_in_flight", f"must be at least 1, got {self.max_in_flight}")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    out: str = option("", "new folder for the Orbax checkpoint")

    def __post_init__(self) -> None:
        if not self.out:
            raise InvalidParam("out", "name a folder")


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    out: str | None = option(None, "folder for the programs (default: beside the checkpoint)")


@dataclass(frozen=True, kw_only=True)
class ModelsOptions:
    json: bool = option(False, "one JSON object a line")


@dataclass(frozen=True, kw_only=True)
class ShardingOptions:
    action: Literal["explain"] = option("explain", "explain: print every parameter with its cut and its bytes")
    chip: str = option("v6e", "the kind of device: v5e, v5p, v6e, tpu7x, h100 or h200")
    devices: int = option(8, "how many there are")
    json: bool = option(False, "one JSON object")

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise InvalidParam("devices", f"must be a positive number, got {self.devices}")
        if self.action != "explain":
            raise InvalidParam("action", f"must be explain, got {self.action!r}")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    topology: tuple[str, ...] = option((), "chips that need not be there: v6e:2x4, tpu7x:2x2x1, h200:8, cpu:8")
    prompt: tuple[int, ...] = option((), "prompt length to give TTFT for, in tokens")
    batch: tuple[int, ...] = option((), "sequences decoding at once to give TPOT for")
    context: int | None = option(None, "tokens of each of those sequences")
    price: float | None = option(None, "of a chip-hour, for the cost of a million tokens")
    memory_gib: int | None = option(None, "memory of a CPU device, in GiB")
    compile: bool = option(True, "compile the largest decode and prefill program of each layout")
    effort: Literal["quick", "served"] = option(
        "quick", "quick compiles for TPUs with few optimizations, which overstates temporaries; served as it is served"
    )
    full: bool = option(False, "compile all layers, where two depths and a line would do")
    search: bool = option(False, "try every file of configs/sharding, and compile the best layouts")
    goal: Literal["tpot", "throughput", "context"] = option(
        "tpot", "what --search ranks by: lowest TPOT, most tokens a second and chip, most tokens in the cache"
    )
    try_quantization: tuple[str, ...] = option(
        (), "quantization that --search tries too: none or one of --quantization's"
    )
    best: int = option(2, "layouts that --search compiles")
    json: bool = option(False, "one JSON object")
    html: str | None = option(None, "file to write a page with charts to")

    def __post_init__(self) -> None:
        if not self.topology:
            raise InvalidParam("topology", "name one, as v6e:2x4 or h200:8")
        if self.goal not in ("tpot", "throughput", "context"):
            raise InvalidParam("goal", f"must be tpot, throughput or context, got {self.goal!r}")
        if self.effort not in ("quick", "served"):
            raise InvalidParam("effort", f"must be quick or served, got {self.effort!r}")
        for name in self.try_quantization:
            if name not in (known := ("none", *get_args(Quantization))):
                raise InvalidParam("try_quantization", f"must be one of {', '.join(known)}, got {name!r}")
        for name in ("context", "price", "memory_gib", "best"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InvalidParam(name, f"must be positive, got {value}")


# Fields of SamplingParams that make sense for text on a terminal; the others have no flag.
SAMPLING_HELP = {
    "n": "answers to draw",
    "temperature": "0 takes the likeliest token; higher is more varied",
    "top_p": "keep the likeliest tokens that together have this probability",
    "top_k": "keep this many of the likeliest tokens; 0 keeps all",
    "min_p": "keep tokens at least this probable, relative to the likeliest",
    "presence_penalty": "against tokens that the output already has",
    "frequency_penalty": "the same, by how often",
    "repetition_penalty": "divides the logits of tokens in prompt or output",
    "seed": "makes sampling repeatable",
    "stop": "text that ends the output",
    "stop_token_ids": "token id that ends the output",
    "ignore_eos": "go on after the model's end token",
    "max_tokens": "most tokens to generate",
    "min_tokens": "fewest tokens before an end",
    "logit_bias": 'added to logits: {"token id": bias}',
    "allowed_token_ids": "token id that may be drawn; all others may not",
    "bad_words": "word that may not be drawn",
    "include_stop_str_in_output": "print the stop text too",
    "skip_special_tokens": "leave special tokens out of the text",
}
