"""The rules that keep the code base in layers, read off the source with `ast`.

Each rule is a function from (module name, syntax tree) to offences, and each is shown to
fail on a small bad example. Size budgets are printed, not enforced.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "pallas_kernels", "sharding", "server", "configs")
Rule = Callable[[str, ast.Module], list[str]]

# What a package may import of ours besides itself; the longest matching prefix decides.
MAY_IMPORT = {
    "server": ("engine", "configs"),
    "engine": ("pallas_kernels", "sharding", "configs"),
    "engine.model": ("pallas_kernels", "sharding", "engine.errors", "engine.json_file"),
    "pallas_kernels": (),
    "sharding": (),
    "configs": (),
    "benchmarks": ("server", "engine", "pallas_kernels", "sharding", "configs"),
    **{
        f"server.commands.bench_{name}": ("server", "engine", "configs", "benchmarks")
        for name in ("serve", "offline", "startup", "steps")
    },
}
# Host bookkeeping: tested in milliseconds, on a machine without JAX.
NO_JAX = {
    *(f"engine.{name}" for name in ("request", "errors", "json_file", "config", "stats", "sequence", "hosts")),
    *(f"engine.{name}" for name in ("pages", "checkpoints", "prefix_cache", "scheduler", "groups", "policy")),
    *(f"engine.pooling.{name}" for name in ("config", "request")),
    "server.cli",
    "server.options",
    "server.batch",
    "configs",
}
MAY_JIT = {
    "engine.executables",  # the programs
    "engine.model.decoder",  # one trace for all equal layers, inside the programs
    "benchmarks.roofline",  # a copy and a product, to know the machine by
}
FORBIDDEN = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "torch"}
MAY_READ_ENVIRONMENT = {
    "engine.config",  # the cache folder
    "engine.hosts",  # LeaderWorkerSet says there who takes part
    "pallas_kernels.native.build",  # CXX names the compiler, as for every build; nothing at run time
    "sharding.topology",  # libtpu takes the chip to compile for from there, and from nowhere else
    "engine.program_key",  # XLA's own flags are part of the key of a compiled program
}
# (module, imported name) -> why it cannot stand at the top of the file.
LATE_IMPORTS: dict[tuple[str, str], str] = {
    ("engine", "engine.llm"): "loads JAX, which `octavo --help` and the host modules need not wait for",
    ("engine.registry", "engine.hub"): "the hub's client costs 0.3 s that what is on disk need not pay",
    ("engine.model.weights", "engine.model.weights.orbax"): "Orbax costs a second that other formats need not pay",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def runtime_modules() -> Iterator[tuple[str, ast.Module]]:
    """The packages, and of the benchmarks what `octavo bench` imports."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield module_name(path), ast.parse(path.read_text(), str(path))
    waiting, seen = sorted((ROOT / "server" / "commands").glob("bench_*.py")), set()
    while waiting:
        for name in benchmarks_of(waiting.pop()) - seen:
            path = ROOT / "benchmarks" / f"{name}.py"
            yield f"benchmarks.{name}", ast.parse(path.read_text(), str(path))
            waiting.append(path)
            seen.add(name)


def benchmarks_of(path: Path) -> set[str]:
    """The modules of the benchmarks that a file imports."""
    found = [name.split(".") for name, _ in imports(ast.parse(path.read_text(), str(path)))]
    return {parts[1] for parts in found if parts[0] == "benchmarks"}


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import; `from a import b` gives a.b, so that modules are seen whole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield f"relative import of {node.module}", node.lineno
            else:
                yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layers(module: str, tree: ast.Module) -> list[str]:
    """Imports of ours point down only."""
    home = max((prefix for prefix in MAY_IMPORT if within(module, prefix)), key=len)
    allowed = (home, *MAY_IMPORT[home])
    return [
        f"{module}:{line} imports {name}; {home} may import {', '.join(allowed)}"
        for name, line in imports(tree)
        if name.startswith("relative") or (name.split(".")[0] in (*PACKAGES, "tests", "benchmarks")
                                           and not any(within(name, a) for a in allowed))
    ]  # fmt: skip


def host_modules_without_jax(module: str, tree: ast.Module) -> list[str]:
    if not any(within(module, name) for name in NO_JAX):
        return []
    heavy = ("jax", "jaxlib", "flax", "orbax")
    return [f"{module}:{line} imports {name}" for name, line in imports(tree) if name.split(".")[0] in heavy]


def jit_in_few_files(module: str, tree: ast.Module) -> list[str]:
    """The closed set of programs is only closed when few files can make one. Kernels are traced, not jitted.
    Benchmarks serve nobody."""
    if module in MAY_JIT or within(module, "benchmarks"):
        return []
    return [
        f"{module}:{node.lineno} uses jit; only {', '.join(sorted(MAY_JIT))} may"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("jit", "pmap"))
        or (isinstance(node, ast.ImportFrom) and any(alias.name in ("jit", "pmap") for alias in node.names))
    ]


def no_unsafe_modules(module: str, tree: ast.Module) -> list[str]:
    return [f"{module}:{line} imports {name}" for name, line in imports(tree) if name.split(".")[0] in FORBIDDEN]


def no_asserts(module: str, tree: ast.Module) -> list[str]:
    """`python -O` removes them; a guard that must hold is an `if` and a `raise`."""
    return [f"{module}:{node.lineno} assert" for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def no_late_imports(module: str, tree: ast.Module) -> list[str]:
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    found = {(name, line) for function in functions for name, line in imports(function)}
    return [
        f"{module}:{line} imports {name} inside a function"
        for name, line in sorted(found, key=lambda item: item[1])
        if not any(module == m and within(name, allowed) for m, allowed in LATE_IMPORTS)
    ]


def no_environment(module: str, tree: ast.Module) -> list[str]:
    """Behaviour does not read the environment; the cache folder is the platform's to say."""
    if module in MAY_READ_ENVIRONMENT:
        return []
    reads = ("environ", "getenv", "putenv")
    return [
        f"{module}:{node.lineno} reads the environment"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in reads
    ]


def declared_dependencies(module: str, tree: ast.Module) -> list[str]:
    """What the runtime imports is in pyproject's dependencies, so a fresh install works."""
    declared = core_dependencies() | set(sys.stdlib_module_names) | set(PACKAGES) | {"benchmarks"}  # `layers` says who
    return [
        f"{module}:{line} imports {name}, which no core dependency brings"
        for name, line in imports(tree)
        if name.split(".")[0] not in declared
    ]


# Import names that differ from the distribution's, or that a dependency declares as its own.
IMPORT_NAMES = {
    "jinja2": ["jinja2", "markupsafe"],
    "jax": ["jax", "jaxlib", "ml_dtypes"],
    "orbax-checkpoint": ["orbax", "etils"],
    "pyyaml": ["yaml"],
    "fastapi": ["fastapi", "starlette"],
    "uvicorn": ["uvicorn", "uvloop"],
}


def core_dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[\[<>=! ]", line)[0] for line in project["dependencies"]]
    return {name for dist in names for name in IMPORT_NAMES.get(dist, [dist.replace("-", "_")])}


BAD_EXAMPLES: list[tuple[Rule, str, str]] = [
    (layers, "engine.loop", "from server import app"),
    (layers, "engine.model.decoder", "from engine.request import Request"),
    (layers, "engine.model.decoder", "import engine.loop"),
    (layers, "pallas_kernels.paged_attention.tpu", "from engine.config import EngineConfig"),
    (layers, "sharding.rules", "import pallas_kernels"),
    (layers, "configs", "from engine import config"),
    (layers, "server.app", "from tests.conftest import ROOT"),
    (layers, "server.app", "from benchmarks import client"),
    (layers, "server.commands.bench", "from benchmarks import client"),
    (layers, "benchmarks.client", "from tests.oracle import forward"),
    (layers, "engine.loop", "from . import request"),
    (host_modules_without_jax, "engine.scheduler", "import jax.numpy as jnp"),
    (host_modules_without_jax, "engine.pages", "def f():\n    from jax import Array"),
    (jit_in_few_files, "engine.model.layers", "import jax\nf = jax.jit(lambda x: x)"),
    (jit_in_few_files, "sharding.plan", "from jax import jit"),
    (no_unsafe_modules, "engine.weights", "import pickle"),
    (no_unsafe_modules, "engine.weights", "from torch import nn"),
    (no_asserts, "engine.pages", "def f(x):\n    assert x > 0"),
    (no_late_imports, "engine.loop", "def f():\n    import json"),
    (no_late_imports, "engine.loop", "class A:\n    async def f(self):\n        from json import loads"),
    (no_environment, "engine.loop", "import os\nx = os.environ.get('X')"),
    (declared_dependencies, "engine.loop", "import requests"),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in BAD_EXAMPLES))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    offences = [offence for module, tree in runtime_modules() for offence in rule(module, tree)]
    assert not offences, "\n".join(offences)


@pytest.mark.parametrize(("rule", "module", "source"), BAD_EXAMPLES)
def test_rule_can_fail(rule: Rule, module: str, source: str) -> None:
    assert len(rule(module, ast.parse(source))) == 1


def test_allowlists_are_not_stale() -> None:
    """A module that is gone, or an import that moved up, leaves its list."""
    trees = dict(runtime_modules())
    late = {
        (module, name)
        for module, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for name, _ in imports(node)
    }
    unused = [key for key in LATE_IMPORTS if not any(m == key[0] and within(n, key[1]) for m, n in late)]
    assert not unused


# Soft budgets: a function or file over one may stay, with a reason.
MAX_FILE, MAX_FUNCTION, MAX_KERNEL, MAX_NESTING, MAX_ARGS, MAX_ATTRIBUTES = 300, 40, 150, 3, 6, 15
NESTS = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.Match)


def nesting(node: ast.AST, depth: int = 0) -> int:
    deepest = depth
    for child in ast.iter_child_nodes(node):
        # An `elif` is an If inside an If's else, and reads at the same depth.
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting(child, depth + (isinstance(child, NESTS) and not is_elif)))
    return deepest


def over_budget(module: str, tree: ast.Module, num_lines: int) -> list[str]:
    found = [f"{module}: {num_lines} lines in the file"] if num_lines > MAX_FILE else []
    max_lines = MAX_KERNEL if within(module, "pallas_kernels") else MAX_FUNCTION
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            args = len([a for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")])
            figures = (
                (lines, max_lines, "lines"),
                (nesting(node), MAX_NESTING, "levels"),
                (args, MAX_ARGS, "arguments"),
            )
            found += [f"{module}.{node.name}: {value} {unit}" for value, most, unit in figures if value > most]
        elif isinstance(node, ast.ClassDef):
            attributes = {
                n.attr for n in ast.walk(node)
                if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
                and isinstance(n.value, ast.Name) and n.value.id == "self"
            }  # fmt: skip
            if len(attributes) > MAX_ATTRIBUTES:
                found.append(f"{module}.{node.name}: {len(attributes)} attributes")
    return found


def test_size_budgets_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        offence
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for text in [path.read_text()]
        for offence in over_budget(module_name(path), ast.parse(text), text.count("\n"))
    ]
    with capsys.disabled():
        print(f"\nsize budgets: {len(found)} over", *found, sep="\n  ")


def test_size_budgets_see_what_is_too_big() -> None:
    long = "def f(a, b, c, d, e, g, h):\n" + "    x = 1\n" * 40
    deep = "def f():\n for a in b:\n  if c:\n   while d:\n    with e:\n     pass"
    flat = "def f():\n if a:\n  pass\n elif b:\n  pass\n elif c:\n  pass\n elif d:\n  pass"
    wide = "class A:\n    def f(self):\n" + "".join(f"        self.a{i} = {i}\n" for i in range(16))
    found = [over_budget("engine.x", ast.parse(source), 10) for source in (long, deep, flat, wide)]
    assert [len(offences) for offences in found] == [2, 1, 0, 1]
    assert over_budget("engine.x", ast.parse(""), 301)
