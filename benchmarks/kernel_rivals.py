"""Other people's kernels on our cases: JAX's Pallas ops, XLA's own lowerings, cuDNN and torch.

Each is an adapter that brings a case's inputs into the library's layout outside the timed part, or
says why it does not serve the case. Nothing here is imported by the engine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.kernel_work import Work
from pallas_kernels.kv_layout import unpack_rows
from pallas_kernels.quantized import dequantize
from pallas_kernels.target import Target

Inputs = tuple[tuple[Any, ...], tuple[Any, ...]]  # moving, fixed
FAULTS = (ValueError, TypeError, RuntimeError, AssertionError, AttributeError, KeyError, IndexError, ImportError)


@dataclass(frozen=True)
class Rival:
    """`call(*moving, *fixed)` of what `prepare` makes of a case's inputs; None: they are taken as they are.

    fetch: where it is no JAX program. `call` takes `turns` and waits for the device itself; `fetch` makes
    numpy of what it returns.
    """

    name: str
    call: Callable[..., Any]
    prepare: Callable[[Inputs], Inputs] | None = None
    fetch: Callable[[Any], np.ndarray] | None = None


class NotServed(Exception):
    """Why a library does not serve a case."""


def rivals(work: Work, target: Target) -> tuple[list[Rival], dict[str, str]]:
    """Who else serves the case, and why the others do not."""
    found: list[Rival] = []
    skipped: dict[str, str] = {}
    for platform, name, adapter in ADAPTERS[work.op]:
        if platform not in ("any", target.platform):
            continue
        try:
            found.append(Rival(name, *adapter(work)))
        except (NotServed, *FAULTS) as reason:
            skipped[name] = short(reason)
    return found, skipped


def short(reason: BaseException) -> str:
    """An exception in one line."""
    text = str(reason).strip() or type(reason).__name__
    return text.splitlines()[0][:160]


def module(name: str) -> Any:
    """An optional library; its absence is a reason, not a fault."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, AttributeError) as error:
        raise NotServed(f"{name} cannot be imported: {short(error)}") from error


# Attention.


def _plain_attention(work: Work) -> Any:
    """The case, if it is bfloat16 without the features that libraries lack."""
    case = work.case
    if case.kv_dtype is not None:
        raise NotServed(f"KV in {case.kv_dtype}")
    if case.dtype != "bfloat16":
        raise NotServed(f"{case.dtype}, not bfloat16")
    if case.sinks:
        raise NotServed("attention sinks")
    if case.value_dim is not None:
        raise NotServed("latent KV")
    return case


def ragged_paged_attention(work: Work) -> Any:
    """JAX's kernel for TPUs; its pages are ours with the row cut into heads."""
    case = _plain_attention(work)
    if case.head_dim % 128:
        raise NotServed(f"head_dim {case.head_dim} is not a multiple of 128")
    library = module("jax.experimental.pallas.ops.tpu.ragged_paged_attention")
    how = {"sm_scale": 1.3 * case.head_dim**-0.5, "sliding_window": case.window, "soft_cap": case.softcap}
    decode = case.queries is None

    def prepare(inputs: Inputs) -> Inputs:
        (q, _, lens, tables), (pages,) = inputs
        pages = pages.reshape(*pages.shape[:2], 2 * case.kv_heads, case.head_dim)
        count = jnp.ones_like(lens[0]) if decode else lens[1]
        total = lens[0] if decode else lens[1] + lens[2]
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count)])
        return (q, total, tables, starts, jnp.asarray([len(case.lengths)], jnp.int32)), (pages,)

    def call(q: Array, lens: Array, tables: Array, starts: Array, seqs: Array, pages: Array) -> Array:
        return library.ragged_paged_attention(q, pages, lens, tables, starts, seqs, **how)

    return call, prepare


def gathered(work: Work, inputs: Inputs) -> tuple[Array, Array]:
    """Dense keys and values [rows, keys, kv_heads, head_dim] of the rows' pages, trash and stale keys zeroed."""
    case = work.case
    (_, _, _, tables), (pages,) = inputs
    keys = max(case.lengths)
    layout = case.layout("gpu")  # heads are as wide on all accelerators

    def gather(pages: Array, tables: Array) -> Array:
        rows = pages[tables[:, : -(-keys // case.page_size)]]
        kv = unpack_rows(rows.reshape(len(case.lengths), -1, pages.shape[-1])[:, :keys], layout)
        seen = jnp.arange(keys)[None, :] < jnp.asarray(case.lengths, jnp.int32)[:, None]
        return jnp.where(seen[:, :, None, None, None], kv, 0).astype(case.dtype)

    kv = jax.jit(gather)(pages, tables)
    return kv[:, :, :, 0], kv[:, :, :, 1]


def _dense_shape(work: Work) -> Any:
    """The case, if its rows are a dense batch: decode, or one whole prompt."""
    case = _plain_attention(work)
    if case.softcap is not None:
        raise NotServed("soft cap")
    if case.queries is not None and (len(case.lengths) != 1 or case.queries != case.lengths or case.padding):
        raise NotServed("ragged prompts or a chunk with a past; serves one whole prompt")
    return case


def cudnn_attention(work: Work) -> Any:
    """cuDNN through jax.nn, on keys and values gathered beforehand."""
    case = _dense_shape(work)
    decode = case.queries is None
    if decode and case.window is not None:
        raise NotServed("a window without a causal mask")
    how = {"scale": 1.3 * case.head_dim**-0.5, "implementation": "cudnn", "is_causal": not decode}
    if case.window is not None:
        how["local_window_size"] = (case.window - 1, 0)

    def prepare(inputs: Inputs) -> Inputs:
        (q, _, lens, _), _ = inputs
        return (q[:, None] if decode else q[None], lens[0]), gathered(work, inputs)

    def call(q: Array, lens: Array, k: Array, v: Array) -> Array:
        limit = {"key_value_seq_lengths": lens} if decode else {}
        out = jax.nn.dot_product_attention(q, k, v, **limit, **how)
        return out[:, 0] if decode else out[0]

    return call, prepare


def attention_mgpu(work: Work) -> Any:
    """JAX's Mosaic GPU flash attention: one whole prompt, float16. Queries are scaled beforehand, as it does not."""
    case = _dense_shape(work)
    if case.queries is None or case.window is not None:
        raise NotServed("no decode, no window")
    library = module("jax.experimental.pallas.ops.gpu.attention_mgpu")
    block_kv = 128 if case.head_dim <= 128 else 64
    config = library.TuningConfig(block_q=64, block_kv=block_kv, max_concurrent_steps=2, causal=True)

    def prepare(inputs: Inputs) -> Inputs:
        (q, *_), _ = inputs
        q = (q.astype(jnp.float32) * (1.3 * case.head_dim**-0.5)).astype(jnp.float16)
        return (q[None],), tuple(a.astype(jnp.float16) for a in gathered(work, inputs))

    return lambda q, k, v: library.attention(q, k, v, config)[0], prepare


def torch_attention(work: Work) -> Any:
    """torch's scaled_dot_product_attention on keys and values gathered beforehand."""
    case = _dense_shape(work)
    decode = case.queries is None
    if case.window is not None:
        raise NotServed("a window takes a mask in memory")
    if decode and len(set(case.lengths)) > 1:
        raise NotServed("rows of several lengths take a mask in memory")
    torch = module("torch")
    if not torch.cuda.is_available():
        raise NotServed("torch sees no GPU")
    how = {"scale": 1.3 * case.head_dim**-0.5, "is_causal": not decode, "enable_gqa": case.q_heads != case.kv_heads}

    def to_torch(a: Array) -> Any:
        bits = torch.from_numpy(np.asarray(a).view(np.int16).copy()).cuda()
        return bits.view(torch.bfloat16).transpose(1, 2)  # [rows, heads, tokens, head_dim]

    def prepare(inputs: Inputs) -> Inputs:
        (q, *_), _ = inputs
        k, v = gathered(work, inputs)
        return (to_torch(q[:, None] if decode else q[None]),), (to_torch(k), to_torch(v))

    def call(q: Any, k: Any, v: Any, turns: int = 1) -> Any:
        out = None
        for _ in range(turns):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, **how)
        torch.cuda.synchronize()
        return out

    def fetch(out: Any) -> np.ndarray:
        wide = out.transpose(1, 2).float()
        return (wide[:, 0] if decode else wide[0]).cpu().numpy()

    return call, prepare, fetch


# Matrices.


def dense_matmul(work: Work) -> Any:
    """What packing is up against: XLA's product with the weight in x's dtype, made wide beforehand."""
    case = work.case
    if case.activations == "dynamic":
        raise NotServed("dynamic activations: another result")

    def prepare(inputs: Inputs) -> Inputs:
        moving, (w,) = inputs
        return moving, (jax.jit(lambda w: dequantize(w, case.dtype))(w),)

    return lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype), prepare


def mixed_matmul_mgpu(work: Work) -> Any:
    """JAX's Hopper kernel of int8 times bfloat16: out^T = W^T x^T with W^T laid out beforehand."""
    case = work.case
    if case.format != "int8" or case.group is not None or case.activations == "dynamic" or case.dtype != "bfloat16":
        raise NotServed("int8 by one scale a column, times bfloat16")
    if case.tokens % 64 or case.n % 256 or case.k % 64:
        raise NotServed(f"{case.tokens} tokens in 64s, N {case.n} in 256s")
    library = module("jax.experimental.pallas.ops.gpu.hopper_mixed_type_matmul_mgpu")
    side = library.MatmulDimension.M
    config = library.TuningConfig(tile_m=128, tile_n=64, tile_k=64, max_concurrent_steps=4, wg_dimension=side)
    multiply = partial(library.mixed_matmul_kernel, out_dtype=jnp.bfloat16, config=config)

    def prepare(inputs: Inputs) -> Inputs:
        (x,), (w,) = inputs
        return (jnp.asarray(x.T),), (jnp.asarray(w.values.T), w.scales)

    def call(x: Array, values: Array, scales: Array) -> Array:
        return (multiply(values, x).astype(jnp.float32).T * scales).astype(x.dtype)

    return call, prepare


def _plain_experts(work: Work) -> Any:
    if work.case.format != "none":
        raise NotServed(f"weights in {work.case.format}")
    return work.case


def ragged_dot(work: Work) -> Any:
    """XLA's own."""
    _plain_experts(work)

    def call(x: Array, sizes: Array, w: Array) -> Array:
        return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32).astype(x.dtype)

    return (call,)


def megablox(work: Work) -> Any:
    """JAX's gmm for TPUs."""
    case = _plain_experts(work)
    library = module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    rows = 512 if case.num_tokens % 512 == 0 else 128
    if case.num_tokens % rows and case.num_tokens > rows:
        raise NotServed(f"{case.num_tokens} rows are not a multiple of {rows}")
    tiling = (min(rows, case.num_tokens), min(1024, case.k), min(1024, case.n))

    def call(x: Array, sizes: Array, w: Array) -> Array:
        return library.gmm(x, w, sizes, preferred_element_type=x.dtype, tiling=tiling)

    return (call,)


def ragged_dot_mgpu(work: Work) -> Any:
    """JAX's Mosaic GPU kernel."""
    case = _plain_experts(work)
    if case.dtype != "bfloat16" or case.k % 64 or case.n % 128:
        raise NotServed(f"bfloat16 with K {case.k} in 64s and N {case.n} in 128s")
    library = module("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")
    rows = 128 if case.num_tokens > 64 * len(case.sizes) else 64
    how = {"block_m": rows, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4, "grid_block_n": 1}

    def call(x: Array, sizes: Array, w: Array) -> Array:
        return library.ragged_dot(x, w, group_sizes=sizes, **how)

    return (call,)


Adapter = Callable[[Work], Any]
ADAPTERS: dict[str, tuple[tuple[str, str, Adapter], ...]] = {
    "paged_attention": (
        ("tpu", "jax ragged_paged_attention", ragged_paged_attention),
        ("gpu", "jax attention_mgpu", attention_mgpu),
        ("gpu", "cudnn", cudnn_attention),
        ("gpu", "torch sdpa", torch_attention),
    ),
    "quantized_matmul": (
        ("any", "xla dense", dense_matmul),
        ("gpu", "jax mixed_type_matmul_mgpu", mixed_matmul_mgpu),
    ),
    "kv_write": (),
    "grouped_matmul": (
        ("any", "xla ragged_dot", ragged_dot),
        ("tpu", "jax megablox", megablox),
        ("gpu", "jax ragged_dot_mgpu", ragged_dot_mgpu),
    ),
}
