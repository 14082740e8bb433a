"""What a device would hold, predicted from shapes alone, and what is left for the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.config import EngineConfig, EngineOptions
from engine.errors import CapacityError, InvalidParam, ModelError
from engine.estimate.chips import Topology
from engine.explain import planned_config
from engine.model.config import ModelConfig
from engine.programs import held_bytes, page_bytes, slots_of, state_bytes
from engine.resolve import usable_bytes, with_pages
from pallas_kernels.quantized import tree_bytes


@dataclass(frozen=True)
class Holding:
    """Bytes on one device."""

    usable: int
    weights: int
    slots: int
    states: int
    temporary: int  # of the hungriest program: the compiler's, or 0 where nothing was compiled
    page: int  # of one page in all layers
    page_size: int  # tokens
    pages: int  # that the rest has room for, at most as many as are of use
    groups: int = 1  # of requests, each with pages of its own on its devices

    @property
    def held(self) -> int:
        """Before any page."""
        return self.weights + self.slots + self.states + self.temporary

    @property
    def pool(self) -> int:
        return self.pages * self.page

    @property
    def tokens(self) -> int:
        """That the cache has room for, of all groups."""
        return self.groups * self.pages * self.page_size

    def sequences(self, length: int) -> int:
        """Of so many tokens that the cache has room for."""
        return self.groups * (self.pages // -(-length // self.page_size))


def holding(
    options: EngineOptions, model: ModelConfig, config: EngineConfig, topology: Topology, temporary: int = 0
) -> Holding:
    """Of one device of the topology; pages: 0 where there is no room for one."""
    states, page = state_bytes(model, config), page_bytes(model, config)
    held, device = held_bytes(model, config), topology.device
    try:
        sized = with_pages(config, options.kv_cache_memory_bytes, page, held + temporary, device)
        pages = sized.num_pages - 1
    except CapacityError:
        pages = 0
    slots = tree_bytes(slots_of(model, config))
    return Holding(
        usable_bytes(device),
        held - slots - states,
        slots,
        states,
        temporary,
        page,
        config.page_size,
        pages,
        config.num_groups,
    )


def fits(found: Holding, config: EngineConfig) -> bool:
    """Whether one sequence as long as it may be has room."""
    return found.held <= found.usable and found.sequences(config.max_model_len) >= 1


def changes_that_fit(
    options: EngineOptions, model: ModelConfig, topology: Topology, temporary: int
) -> list[tuple[str, Holding]]:
    """Single changes after which the model has room, each tried; with what a device then holds.

    temporary: of the hungriest program, taken to stay as it is.
    """
    found = []
    for text, changed, at in _changes(options, topology):
        try:
            config = planned_config(changed, model, at.device)
            then = holding(changed, model, config, at, temporary)
        except (InvalidParam, ModelError):  # sizes that do not divide are no way out
            continue
        if fits(then, config):
            found.append((text, then))
    return found


def _changes(options: EngineOptions, topology: Topology) -> Iterator[tuple[str, EngineOptions, Topology]]:
    """From the mildest: what changes least in the answers first."""
    config_len, seqs = options.max_model_len, options.max_num_seqs
    for length in (131072, 65536, 32768, 16384, 8192, 4096):
        if config_len is None or length < config_len:
            yield f"--max-model-len {length}", replace(options, max_model_len=length), topology
    for count in (128, 64, 32, 16, 8):
        if seqs is None or count < seqs:
            yield f"--max-num-seqs {count}", replace(options, max_num_seqs=count), topology
    if options.kv_cache_dtype == "auto":
        yield "--kv-cache-dtype fp8", replace(options, kv_cache_dtype="fp8"), topology
    if options.quantization in ("auto", "none"):
        for name in ("int8", "int4"):
            yield f"--quantization {name}", replace(options, quantization=name), topology
    for larger in _larger(topology):
        yield f"--topology {larger.name}", options, larger


def _larger(topology: Topology) -> Iterator[Topology]:
    """The shape doubled along its smallest side, up to sixteen times the chips."""
    most = topology.chip.links.most if topology.chip.links and topology.chip.links.most else topology.num_chips * 16
    shape = list(topology.shape)
    for _ in range(4):
        side = shape.index(min(shape))
        shape[side] *= 2
        larger = Topology(topology.chip, tuple(shape))
        if larger.num_chips > most:
            return
        yield larger
