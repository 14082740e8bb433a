"""A sharding file: mesh axes with their sizes, and which logical axis of a weight is cut over which mesh axes.

    mesh:
      tensor: fill              # one axis may take what the others leave of the devices
    rules:                      # in order; the first whose mesh axes divide the size wins
      - kv_heads: tensor
      - mlp: [expert, tensor]   # over the product of two axes
      - mlp: null               # not cut: the last resort, if it is wanted
      - kv_heads: {axes: tensor, replicate: true}   # also where tensor is a multiple of them: several hold each

    overrides:                  # of single parameters, by path, before the rules; * is anything but a dot
      - layers.*.shared_*: {mlp: null}

A logical axis without a rule is not cut. Every error names file and line.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import yaml

from sharding.shards import Axis, Override, Shards, scope_of

LOGICAL_AXES = (
    "requests",
    "sequence",
    "layers",
    "vocab",
    "embed",
    "kv_heads",
    "q_heads",
    "head_dim",
    "mlp",
    "experts",
    "expert_mlp",
)
OF_NO_WEIGHT = ("requests", "sequence", "layers")
UNCUT = ("embed", "head_dim")  # a cut there would need a sum after every layer's first product
# What needs all of something that an axis cuts cannot be cut over the same mesh axes.
APART = {
    "requests": (("vocab", "kv_heads", "q_heads", "sequence"), "requests are divided there, and each group needs all"),
    "sequence": (("kv_heads", "q_heads"), "a sequence's pages are spread there, and each head needs all of them"),
    "layers": (("kv_heads", "q_heads", "mlp", "experts", "expert_mlp"), "its devices have different layers"),
}
REPLICABLE = ("kv_heads",)  # a copy still has query heads of its own to serve; of others it would do the same work
OVERRIDABLE = ("vocab", "mlp", "experts", "expert_mlp")  # heads are cut as pages are, and those alike in all layers
Parameters = Mapping[str, Mapping[str, int]]  # path: size of each logical axis of the parameter
MAX_BYTES = 64 << 10
MAX_DEVICES = 1 << 20
_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")
_PATTERN = re.compile(r"[a-z0-9_.*]+\Z")


class ShardingError(ValueError):
    """A sharding file that is wrong, or that does not fit a model and its devices."""


@dataclass(frozen=True)
class Rule:
    """Cut `logical` over the product of `mesh_axes`; none: leave it whole."""

    logical: str
    mesh_axes: tuple[str, ...]
    line: int
    replicate: bool = False  # also where the parts are a multiple of the size

    def __str__(self) -> str:
        over = " * ".join(self.mesh_axes) or "null"
        return f"{self.logical}: {over}{', replicated' if self.replicate else ''} (line {self.line})"

    def copies(self, sizes: tuple[int, ...], parts: int) -> int | None:
        """How many of so many parts hold each element; None: the rule does not fit."""
        if all(size % parts == 0 for size in sizes):
            return 1
        return parts // sizes[0] if self.replicate and len(sizes) == 1 and parts % sizes[0] == 0 else None


@dataclass(frozen=True)
class OverrideRule:
    """Of the parameters whose path fits `pattern`, cut each logical axis over the product of mesh axes."""

    pattern: str
    cuts: tuple[tuple[str, tuple[str, ...]], ...]
    line: int

    def matches(self, name: str) -> bool:
        return re.fullmatch(re.escape(self.pattern).replace(r"\*", "[^.]*"), name) is not None


@dataclass(frozen=True)
class Strategy:
    """A checked file. A size of None is filled with the devices that the other axes leave."""

    name: str
    mesh: tuple[tuple[str, int | None], ...] = ()
    rules: tuple[Rule, ...] = ()
    overrides: tuple[OverrideRule, ...] = ()

    def shards(
        self, sizes: Mapping[str, tuple[int, ...]], num_devices: int, parameters: Parameters | None = None
    ) -> Shards:
        """What the rules come to for a model on so many devices.

        sizes: of each logical axis, every size that it has in the model's weights. parameters: those that overrides
        may name. Raises ShardingError with the logical axis, the sizes and the rules that were tried.
        """
        mesh = self._filled(num_devices)
        found: dict[str, tuple[str, ...]] = {}
        copies: dict[str, int] = {}
        for logical, its_sizes in {**dict.fromkeys(OF_NO_WEIGHT, ()), **sizes}.items():
            rules = [rule for rule in self.rules if rule.logical == logical]
            for rule in rules:
                held_by = rule.copies(its_sizes, math.prod(mesh[axis] for axis in rule.mesh_axes))
                if held_by is not None:
                    found[logical] = tuple(axis for axis in rule.mesh_axes if mesh[axis] > 1)
                    copies[logical] = held_by
                    break
            else:
                if rules:
                    raise ShardingError(self._nothing_divides(rules, its_sizes, mesh))
        shards = Shards(
            tuple(Axis(*axis) for axis in mesh.items()),
            tuple((k, v) for k, v in found.items() if v),
            tuple((k, v) for k, v in copies.items() if v > 1),
        )
        shards = replace(shards, overrides=self._overridden(shards, parameters or {}))
        self._check_apart("", shards)
        for name, axes in (parameters or {}).items():
            self._check_apart(f"{name}: ", shards.at(scope_of(name)))
            self._check_once(name, axes, shards.at(scope_of(name)))
        return shards

    def _check_apart(self, where: str, shards: Shards) -> None:
        for other, (needs_all, why) in APART.items():
            for logical in needs_all:
                shared = set(shards.axes(logical)) & set(shards.axes(other))
                if shared:
                    raise ShardingError(f"sharding {self.name}: {where}{logical} cannot be cut over "
                                        f"{', '.join(sorted(shared))}: {why}")  # fmt: skip

    def _check_once(self, name: str, axes: Iterable[str], shards: Shards) -> None:
        taken: dict[str, str] = {}
        for logical in axes:
            for over in shards.axes(logical):
                if over in taken:
                    raise ShardingError(f"sharding {self.name}: {name} would be cut over {over} twice, along "
                                        f"{taken[over]} and along {logical}")  # fmt: skip
                taken[over] = logical

    def _overridden(self, shards: Shards, parameters: Parameters) -> tuple[Override, ...]:
        """What each scope gets; within one, parameters that share a logical axis must come to the same."""
        for rule in self.overrides:
            self._check_names_something(rule, parameters)
        found: dict[tuple[str, str], tuple[str, Override | None]] = {}
        for name, sizes in parameters.items():
            for logical, size in sizes.items():
                override = self._override(name, logical, size, shards)
                first, other = found.setdefault((scope_of(name), logical), (name, override))
                cuts = [shards.axes(logical) if one is None else one.axes for one in (other, override)]
                if cuts[0] != cuts[1]:
                    lines = ", ".join(str(rule.line) for rule in self.overrides if logical in dict(rule.cuts))
                    raise ShardingError(f"sharding {self.name}: line {lines}: {name} and {first} are multiplied along "
                                        f"{logical}, and overrides cut only one of them so")  # fmt: skip
        return tuple(override for _, override in found.values() if override is not None)

    def _override(self, name: str, logical: str, size: int, shards: Shards) -> Override | None:
        """The first that names the parameter and the axis."""
        for rule in self.overrides:
            if logical in dict(rule.cuts) and rule.matches(name):
                axes = tuple(axis for axis in dict(rule.cuts)[logical] if shards.parts(axis) > 1)
                if size % shards.parts(axes):
                    raise ShardingError(f"sharding {self.name}: line {rule.line}: {logical} {size} of {name} does not "
                                        f"divide over {' * '.join(axes)} = {shards.parts(axes)}")  # fmt: skip
                return Override(scope_of(name), logical, axes, rule.pattern)
        return None

    def _check_names_something(self, rule: OverrideRule, parameters: Parameters) -> None:
        where = f"sharding {self.name}: line {rule.line}:"
        named = [name for name in parameters if rule.matches(name)]
        if not named:
            known = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in parameters))
            near = difflib.get_close_matches(rule.pattern, known, 1) or [", ".join(known)]
            raise ShardingError(f"{where} no parameter of the model matches {rule.pattern!r}; there is {near[0]}")
        for logical, _ in rule.cuts:
            if not any(logical in parameters[name] for name in named):
                raise ShardingError(f"{where} nothing that {rule.pattern!r} matches has an axis {logical}")

    def _filled(self, num_devices: int) -> dict[str, int]:
        known = math.prod(size for _, size in self.mesh if size is not None)
        rest, left = divmod(num_devices, known)
        open_axes = [axis for axis, size in self.mesh if size is None]
        if not rest or (open_axes and left):
            shape = ", ".join(f"{axis}={size or 'fill'}" for axis, size in self.mesh)
            raise ShardingError(f"sharding {self.name}: a mesh of {shape} needs a multiple of {known} devices, "
                                f"there are {num_devices}")  # fmt: skip
        return {axis: rest if size is None else size for axis, size in self.mesh}

    def _nothing_divides(self, rules: list[Rule], sizes: tuple[int, ...], mesh: dict[str, int]) -> str:
        over = ", ".join(dict.fromkeys(f"{axis}={mesh[axis]}" for rule in rules for axis in rule.mesh_axes))
        tried = "; ".join(map(str, rules))
        which = " and ".join(map(str, sorted(set(sizes))))
        return f"sharding {self.name}: {rules[0].logical} {which} does not divide over {over}; rules tried: {tried}"


def strategies() -> list[str]:
    """The names of the files in configs/sharding."""
    folder = resources.files("configs") / "sharding"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_strategy(name: str) -> Strategy:
    """Of a name in configs/sharding, or of a file. Raises ShardingError."""
    if name in strategies():
        text = (resources.files("configs") / "sharding" / f"{name}.yaml").read_text("utf-8")
        return parse_strategy(name, text)
    path = Path(name).expanduser()
    if not path.is_file():
        near = difflib.get_close_matches(name, strategies(), 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(strategies())}"
        raise ShardingError(f"sharding {name!r} is neither a file nor a name in configs/sharding; {hint}")
    if path.stat().st_size > MAX_BYTES:
        raise ShardingError(f"{path}: over {MAX_BYTES} bytes")
    return parse_strategy(path.name.removesuffix(".yaml"), path.read_text("utf-8", errors="replace"))


def parse_strategy(name: str, text: str) -> Strategy:
    """A `Strategy` of YAML text. Raises ShardingError with the line."""
    reader = _Reader(name)
    try:
        for token in yaml.scan(text):
            if isinstance(token, (yaml.AliasToken, yaml.AnchorToken)):
                raise reader.wrong(token, "anchors and aliases are not read")
        root = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ShardingError(f"sharding {name}:{where} is not YAML: {getattr(error, 'problem', error)}") from error
    parts = reader.mapping(root, ("mesh", "rules", "overrides"), "the file") if root is not None else {}
    mesh = reader.mesh(parts.get("mesh"))
    axes = [axis for axis, _ in mesh]
    rules, overrides = reader.rules(parts.get("rules"), axes), reader.overrides(parts.get("overrides"), axes)
    return Strategy(name, mesh, tuple(rules), tuple(overrides))


class _Reader:
    """Nodes of a file as checked values."""

    def __init__(self, name: str) -> None:
        self.name = name

    def wrong(self, where: yaml.Node | yaml.Token, why: str) -> ShardingError:
        return ShardingError(f"sharding {self.name}: line {where.start_mark.line + 1}: {why}")

    def mapping(self, node: yaml.Node, known: tuple[str, ...] | None, what: str) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self.wrong(node, f"{what} must be a mapping")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            text = self.text(key)
            if known is not None and text not in known:
                near = difflib.get_close_matches(text, known, 1)
                raise self.wrong(key, f"unknown key {text!r}" + (f"; did you mean {near[0]}?" if near else ""))
            if text in found:
                raise self.wrong(key, f"{text!r} stands twice")
            found[text] = value
        return found

    def text(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
            raise self.wrong(node, "a name is expected")
        return node.value

    def mesh(self, node: yaml.Node | None) -> tuple[tuple[str, int | None], ...]:
        axes: list[tuple[str, int | None]] = []
        for name, size in (self.mapping(node, None, "mesh") if node is not None else {}).items():
            if not _NAME.match(name):
                raise self.wrong(size, f"mesh axis {name!r} must be lower-case letters, digits and _")
            axes.append((name, self.size(name, size)))
            if [size for _, size in axes].count(None) > 1:
                raise self.wrong(size, "only one mesh axis can be filled")
            if math.prod(size or 1 for _, size in axes) > MAX_DEVICES:
                raise self.wrong(size, f"a mesh of over {MAX_DEVICES} devices")
        return tuple(axes)

    def size(self, name: str, node: yaml.Node) -> int | None:
        if isinstance(node, yaml.ScalarNode) and node.value == "fill":
            return None
        if not isinstance(node, yaml.ScalarNode) or not re.fullmatch(r"[1-9][0-9]{0,7}", node.value):
            raise self.wrong(node, f"the size of mesh axis {name} must be a number of devices, or fill")
        return int(node.value)

    def items(self, node: yaml.Node | None, what: str) -> list[yaml.Node]:
        if node is not None and not isinstance(node, yaml.SequenceNode):
            raise self.wrong(node, f"{what} must be a list")
        return [] if node is None else node.value

    def overrides(self, node: yaml.Node | None, axes: list[str]) -> Iterator[OverrideRule]:
        for item in self.items(node, "overrides"):
            entries = self.mapping(item, None, "an override")
            if len(entries) != 1:
                raise self.wrong(item, "an override has one pattern")
            ((pattern, cuts),) = entries.items()
            if not _PATTERN.match(pattern):
                raise self.wrong(item, f"{pattern!r} is no path of a parameter: names, numbers, dots and *")
            found = []
            for logical, over in self.mapping(cuts, LOGICAL_AXES, "what an override says").items():
                if logical not in OVERRIDABLE:
                    raise self.wrong(over, f"{logical} is cut alike everywhere: overrides are for "
                                     f"{', '.join(OVERRIDABLE)}")  # fmt: skip
                found.append((logical, self.axes(over, axes)))
            yield OverrideRule(pattern, tuple(found), item.start_mark.line + 1)

    def rules(self, node: yaml.Node | None, axes: list[str]) -> Iterator[Rule]:
        for item in self.items(node, "rules"):
            entries = self.mapping(item, LOGICAL_AXES, "a rule")
            if len(entries) != 1:
                raise self.wrong(item, "a rule has one logical axis")
            ((logical, over),) = entries.items()
            mesh_axes, replicate = self.target(over, axes)
            if mesh_axes and logical in UNCUT:
                raise self.wrong(item, f"{logical} cannot be cut")
            if replicate and logical not in REPLICABLE:
                raise self.wrong(item, f"{logical} cannot be replicated, only {', '.join(REPLICABLE)}")
            yield Rule(logical, mesh_axes, item.start_mark.line + 1, replicate)

    def target(self, node: yaml.Node, known: list[str]) -> tuple[tuple[str, ...], bool]:
        """(mesh axes, replicate) of what a rule says: axes alone, or a mapping with both."""
        if not isinstance(node, yaml.MappingNode):
            return self.axes(node, known), False
        parts = self.mapping(node, ("axes", "replicate"), "a rule")
        if "axes" not in parts:
            raise self.wrong(node, "axes are missing")
        asked = parts.get("replicate")
        if asked is not None and (asked.tag != "tag:yaml.org,2002:bool" or not isinstance(asked.value, str)):
            raise self.wrong(asked, "replicate must be true or false")
        return self.axes(parts["axes"], known), asked is not None and asked.value.lower() == "true"

    def axes(self, node: yaml.Node, known: list[str]) -> tuple[str, ...]:
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
            return ()
        names = [self.text(item) for item in (node.value if isinstance(node, yaml.SequenceNode) else [node])]
        for name in names:
            if name not in known:
                raise self.wrong(node, f"the mesh has no axis {name!r}; it has {', '.join(known) or 'none'}")
        if len(set(names)) < len(names):
            raise self.wrong(node, "a mesh axis is used twice")
        return tuple(names)
