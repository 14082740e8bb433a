"""OpenVINO GenAI's continuous batching on requests from standard input, timed token by token.

Runs under a Python of its own, one with openvino-genai, and imports nothing of ours. Each input line is
{"prompts": [[token id]], "max_new_tokens": n, "concurrency": c}; each output line has, for every prompt, the
seconds from the start of the work to its own start and to its tokens, and the token ids. No HTTP and no
detokenization is timed, which is its best case.
"""

import argparse
import importlib.metadata
import json
import sys
import time

import numpy as np
import openvino as ov
import openvino_genai


def make_pipeline(args):
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = args.cache_gib
    scheduler.max_num_seqs = args.streams
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": args.threads}
    if args.precision:
        properties["INFERENCE_PRECISION_HINT"] = args.precision
    return openvino_genai.ContinuousBatchingPipeline(args.model, scheduler, "CPU", properties)


def run(pipeline, work, begin):
    """Keeps `concurrency` requests going until all are done."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = work["max_new_tokens"]
    config.do_sample = False
    config.ignore_eos = True
    waiting = list(enumerate(work["prompts"]))[::-1]
    found, running = [None] * len(waiting), {}
    while waiting or running:
        while waiting and len(running) < work["concurrency"]:
            number, ids = waiting.pop()
            found[number] = {"start_s": time.perf_counter() - begin, "times_s": [], "tokens": []}
            tensor = ov.Tensor(np.array([ids], np.int64))
            running[number] = pipeline.add_request(number, tensor, config)
        pipeline.step()
        now = time.perf_counter() - begin
        for number, handle in list(running.items()):
            while handle.can_read():
                for output in handle.read().values():
                    found[number]["times_s"].append(now)
                    found[number]["tokens"] += output.generated_ids
            if len(found[number]["tokens"]) >= work["max_new_tokens"]:
                del running[number]
    while pipeline.has_non_finished_requests():
        pipeline.step()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--precision", help="bf16 or f32; what OpenVINO chooses without it")
    parser.add_argument("--cache-gib", type=int, default=1)
    args = parser.parse_args()
    pipeline = make_pipeline(args)
    versions = {name: importlib.metadata.version(name) for name in ("openvino", "openvino-genai")}
    print(json.dumps({"ready": True, "versions": versions}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"requests": run(pipeline, json.loads(line), time.perf_counter())}), flush=True)


if __name__ == "__main__":
    main()
