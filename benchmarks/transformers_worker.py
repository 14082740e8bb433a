"""transformers' `generate` on batches from standard input, timed token by token.

Runs under a Python of its own, one with torch and transformers, and imports nothing of ours.
Each input line is {"prompts": [[token id]], "max_new_tokens": n} with prompts of equal length;
each output line has the seconds of the first token and of the last, and the token ids.
"""

import json
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """Notes when tokens arrive. `generate` puts the prompt first, then each step's tokens."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def main():
    folder, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.eval()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({"ready": True, "versions": versions}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        ids = torch.tensor(work["prompts"])
        count = work["max_new_tokens"]
        clock = Clock()
        start = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                streamer=clock,
                pad_token_id=0,
            )
        end = time.perf_counter()
        times = [t - start for t in clock.times[1:]]  # the first put is the prompt
        tokens = output[:, ids.shape[1] :].tolist()
        print(json.dumps({"first_s": times[0], "end_s": end - start, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
