"""llama.cpp's own HTTP server, in a process of its own, until standard input closes.

Prints one line of JSON with its address when it answers. Run by `benchmarks.peers`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys

from xllamacpp.xllamacpp import CommonParams, Server, ggml_type, llama_flash_attn_type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--tokens-per-stream", type=int, required=True)
    parser.add_argument("--float32", action="store_true", help="keys, values and attention; float16 without it")
    args = parser.parse_args()
    params = CommonParams()
    if args.float32:
        params.cache_type_k = params.cache_type_v = ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.model.path = args.model
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_parallel = args.streams
    params.n_ctx = args.streams * args.tokens_per_stream
    params.cpuparams.n_threads = args.threads
    params.cpuparams_batch.n_threads = args.threads
    params.n_gpu_layers = 0
    params.verbosity = 0
    server = Server(params)
    version = importlib.metadata.version("xllamacpp")
    print(json.dumps({"address": server.listening_address, "version": version}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
