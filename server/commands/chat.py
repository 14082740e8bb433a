"""`octavo chat`: a conversation in the terminal. The history is kept here and sent whole each time."""

from __future__ import annotations

import asyncio
import readline  # noqa: F401 - gives `input` line editing and a history
import sys

from engine.config import EngineOptions
from engine.errors import OctavoError
from engine.request import SamplingParams
from server.commands.loading import generating_engine
from server.commands.options import ChatOptions
from server.commands.terminal import sampling_fields, stream_text, write_now
from server.lifecycle import EngineHandle
from server.local import LocalServer

HELP = "/exit ends, /reset forgets the conversation, Ctrl-C stops an answer"


def run(engine_options: EngineOptions, options: ChatOptions, params: SamplingParams) -> int:
    with generating_engine(engine_options) as engine:
        print(f"{engine.model_name}. {HELP}.", file=sys.stderr)
        converse(engine, options, params)
    return 0


def converse(engine: EngineHandle, options: ChatOptions, params: SamplingParams) -> None:
    """Reads lines until /exit or the end of input, and answers each."""
    system = [{"role": "system", "content": options.system}] if options.system else []
    history = list(system)
    with asyncio.Runner() as runner:
        server = runner.run(_local_server(engine))
        while (line := _read()) is not None:
            if line == "/reset":
                history = list(system)
            elif line.startswith("/"):
                print(HELP, file=sys.stderr)
            elif line:
                history = _turn(runner, server, history, line, params)


def _turn(
    runner: asyncio.Runner, server: LocalServer, history: list[dict[str, str]], line: str, params: SamplingParams
) -> list[dict[str, str]]:
    """The history after one question. A refused question leaves no trace; a stopped answer keeps its beginning."""
    asked = [*history, {"role": "user", "content": line}]
    said: list[str] = []

    def write(text: str) -> None:
        said.append(text)
        write_now(text)

    chunks = server.stream("/v1/chat/completions", {"messages": asked} | sampling_fields(params))
    try:
        runner.run(stream_text(chunks, write))
    except KeyboardInterrupt:
        write_now(" ...")
    except OctavoError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return history
    print()
    return [*asked, {"role": "assistant", "content": "".join(said)}]


async def _local_server(engine: EngineHandle) -> LocalServer:
    return LocalServer(engine)  # it belongs to the event loop that it is made in


def _read() -> str | None:
    """The next line, stripped; None at the end."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
    except UnicodeDecodeError as error:
        raise OctavoError("the input is not valid UTF-8") from error
    return None if line in ("/exit", "/quit") else line
