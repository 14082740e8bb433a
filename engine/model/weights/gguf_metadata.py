"""Metadata of a GGUF file's architecture, read key by key, so that no key that matters is passed over."""

from __future__ import annotations

from typing import Any

from engine.model.gguf_file import GgufFile

# Keys of an architecture without effect on its results.
INERT = frozenset({"vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "attention.causal"})


class Metadata:
    """The keys of the file's architecture, whose reads are counted; `finish` refuses what nobody read."""

    def __init__(self, file: GgufFile, arch: str) -> None:
        self.file, self.arch = file, arch
        self._read: set[str] = set(INERT)

    def value(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return self.file.metadata.get(f"{self.arch}.{key}", default)

    def number(self, key: str, default: int | float | None = None) -> Any:
        """A number, or a list of one equal number per layer. Without `default` the key is required."""
        value = self.value(key, default)
        if isinstance(value, list) and value:
            if any(entry != value[0] for entry in value):
                raise self.file.fail(f"{self.arch}.{key} differs between layers, which is not supported")
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float):
            missing = "is missing" if value is None else f"must be a number, got {str(value)[:60]}"
            raise self.file.fail(f"{self.arch}.{key} {missing}")
        return value

    @property
    def head_dim(self) -> int:
        hidden, heads = self.number("embedding_length"), self.number("attention.head_count")
        head_dim = self.number("attention.key_length", hidden // heads if heads else 0)
        if head_dim < 1:
            raise self.file.fail(f"{self.arch}.attention.head_count {heads} does not divide embedding_length {hidden}")
        return head_dim

    @property
    def num_layers(self) -> int:
        """Without those that predict further tokens, which stand behind them."""
        return self.number("block_count") - self.number("nextn_predict_layers", 0)

    @property
    def kv_heads(self) -> int:
        """Of the layers that attend: a list has 0 for those that recur."""
        value = self.value("attention.head_count_kv", self.number("attention.head_count"))
        attending = {heads for heads in value if heads} if isinstance(value, list) else {value}
        if len(attending) != 1:
            raise self.file.fail(f"{self.arch}.attention.head_count_kv differs between layers, which is not supported")
        return attending.pop()

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    def finish(self) -> None:
        prefix = f"{self.arch}."
        for key, value in self.file.metadata.items():
            if key.startswith(prefix) and key.removeprefix(prefix) not in self._read and value not in (0, False, []):
                raise self.file.fail(f"{key} = {str(value)[:60]} is not supported for {self.arch} and could change "
                                     "its results")  # fmt: skip
