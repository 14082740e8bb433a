"""`octavo compile`: the closed set of programs as a bundle, which loads where it would be compiled."""

from __future__ import annotations

import sys
from pathlib import Path

from engine.config import EngineOptions
from engine.start import write_programs
from server.commands.loading import LoadingLine
from server.commands.options import CompileOptions


def run(engine_options: EngineOptions, options: CompileOptions) -> int:
    line = LoadingLine()
    try:
        folder, sizes = write_programs(engine_options, Path(options.out) if options.out else None, line)
    finally:
        line.clear()
    size_mb = sum(sizes.values()) / 1e6
    how = f" --programs {folder}" if options.out else ""
    print(
        f"octavo: {folder} holds {len(sizes)} programs, {size_mb:.1f} MB; load them with: octavo serve "
        f"{engine_options.model}{how}, and the other options of this command",
        file=sys.stderr,
    )
    return 0
