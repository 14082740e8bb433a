"""A server process around the fake engine, for the tests of signals and exit codes.

Arguments: port, what happens at launch (ok, slow, fail, crash), shutdown timeout in seconds.
"""

from __future__ import annotations

import sys
import threading
import time

from engine.errors import ModelError
from server.config import ServerOptions
from server.process import run
from tests.server.fakes import ByteTokenizer, FakeEngine


def launch(report) -> FakeEngine:
    mode = sys.argv[2]
    report("loading weights", 1, 4)
    if mode == "slow":
        time.sleep(60)
    if mode == "fail":
        raise ModelError("model.gguf: tensor 'x' ends after the file")
    if mode == "crash":
        raise ZeroDivisionError("a bug")
    engine = FakeEngine(tokenizer=ByteTokenizer(), pace_s=0.02)
    if mode == "dies":
        threading.Timer(1.0, engine.kill).start()
    return engine


if __name__ == "__main__":
    sys.exit(run(launch, ServerOptions(port=int(sys.argv[1]), shutdown_timeout_s=float(sys.argv[3]))))
