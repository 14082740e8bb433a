"""The package's build: compiles the CPU kernels where there is a compiler; without one plain XLA serves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface  # pyright: ignore[reportMissingImports]

NATIVE = "pallas_kernels/native"


class NativeKernels(BuildHookInterface):
    """An editable install finds the library beside its source, a wheel carries it and is of one platform."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        spec = importlib.util.spec_from_file_location("native_build", Path(self.root) / NATIVE / "build.py")
        if spec is None or spec.loader is None:
            raise FileNotFoundError(f"{NATIVE}/build.py")
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        library = Path(self.root) / NATIVE / "libnative.so"
        try:
            if not native.up_to_date(library):
                native.build(library)
        except native.NotBuilt as error:
            self.app.display_warning(f"octavo: CPU kernels are not built, plain XLA will serve: {error}")
            return
        build_data["artifacts"].append(f"{NATIVE}/libnative.so")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
