"""`octavo generate`: one prompt, its continuation on the terminal as it comes."""

from __future__ import annotations

import asyncio

from engine.config import EngineOptions
from engine.request import SamplingParams
from server.commands.loading import generating_engine
from server.commands.options import GenerateOptions
from server.commands.terminal import sampling_fields, stream_text, write_now
from server.lifecycle import EngineHandle
from server.local import LocalServer


def run(engine_options: EngineOptions, options: GenerateOptions, params: SamplingParams) -> int:
    with generating_engine(engine_options) as engine:
        asyncio.run(generate(engine, options, params))
    return 0


async def generate(engine: EngineHandle, options: GenerateOptions, params: SamplingParams) -> None:
    """Prints the answer; with n above 1 the further ones follow, each under a line that numbers it."""
    fields = sampling_fields(params)
    if options.chat:
        path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": options.prompt}]}
    else:
        path, body = "/v1/completions", {"prompt": options.prompt}
    if params.n > 1:
        print("--- 1")
    texts = await stream_text(LocalServer(engine).stream(path, body | fields), write_now)
    for number, text in enumerate(texts[1:], start=2):
        print(f"\n--- {number}\n{text}", end="")
    print()
