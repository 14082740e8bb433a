"""Which scheme a quantized Hugging Face checkpoint has, from its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import ModelError
from engine.model.weights.compressed_tensors import compressed_tensors
from engine.model.weights.hf_packed import Config, Scheme, awq, fp8, gptq, mxfp4

SCHEMES: dict[str, Callable[[Config], Scheme]] = {
    "gptq": gptq,
    "awq": awq,
    "fp8": fp8,
    "compressed-tensors": compressed_tensors,
    "mxfp4": mxfp4,
}


def scheme_of(hf: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a config.json; None: nothing is quantized. Raises ModelError that names the key."""
    text = hf.get("text_config")
    config = hf.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if config is None and hf.get("compression_config"):
        raise ModelError("config.json: compression_config is an old spelling that is not supported")
    if config is None:
        return None
    if not isinstance(config, dict):
        raise ModelError(f"config.json: quantization_config = {config!r} must be an object")
    keys = Config(config)
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in SCHEMES:
        raise keys.wrong("quant_method", f"is not supported; known: {', '.join(SCHEMES)}")
    keys.value("quant_method")
    scheme = SCHEMES[method](keys)
    keys.finish()
    return scheme
