"""transformers' encoder on lists of token ids from standard input, pooled and timed.

Runs under a Python of its own, one with torch and transformers, and imports nothing of ours.
Each input line is [[token id]]; each output line has wall and CPU seconds and the embeddings.
"""

import json
import sys
import time

import torch
from transformers import AutoModel

BATCH = 64


def embed(model, ids):
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    found = [None] * len(ids)
    for start in range(0, len(ids), BATCH):
        mine = order[start : start + BATCH]
        longest = max(len(ids[i]) for i in mine)
        tokens = torch.zeros((len(mine), longest), dtype=torch.long)
        mask = torch.zeros((len(mine), longest), dtype=torch.long)
        for row, i in enumerate(mine):
            tokens[row, : len(ids[i])] = torch.tensor(ids[i])
            mask[row, : len(ids[i])] = 1
        hidden = model(tokens, attention_mask=mask).last_hidden_state.float()
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        unit = torch.nn.functional.normalize(mean, dim=1)
        for row, i in enumerate(mine):
            found[i] = unit[row].tolist()
    return found


def main():
    folder, threads, dtype = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])
    torch.set_num_threads(threads)
    model = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        ids = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            found = embed(model, ids)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall_s": wall, "cpu_s": cpu, "embeddings": found}), flush=True)


if __name__ == "__main__":
    main()
