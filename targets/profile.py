"""Capability profiles: what a target takes, as data. One TOML file each, in ``profiles/`` or the user's own.

A profile says what the linter (:mod:`pq_export.targets.lint`) compares a graph with: types, granularity, zero points,
how a linear must stand, the cache, floating-point tensors, operators, opset, shapes. A file states what differs from
the profile that it inherits; without ``inherits`` that is ``static``, the generic one of static-only accelerators. A
SoC may change single fields. docs/profiles.md lists all keys.

Lists name what is taken: ``["any"]`` takes everything, ``[]`` nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from pq_export.errors import UsageError
from pq_export.targets.profile_files import ProfileFile, read_profile_file

PROFILES = Path(__file__).with_name("profiles")
ROOT, BASE = "none", "static"

INTEGERS = ("int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")
FLOATS = ("float16", "bfloat16", "float32", "float64")
TYPES = (*INTEGERS, *FLOATS, "bool")
GRANULARITIES = ("tensor", "channel", "block")

Strings = tuple[str, ...]
ANY: Strings = ("any",)


def _one_of(*names: str) -> dict[str, Any]:
    """Field metadata: which words a string or a list of strings may hold, beside ``any``."""
    return {"choices": names}


def _exactly(*names: str) -> dict[str, Any]:
    """As :func:`_one_of`, without ``any``."""
    return {"choices": names, "exactly": True}


@dataclass(frozen=True)
class Opset:
    """Of the default ONNX domain, both ends included."""

    min: int = 1
    max: int = 1000


@dataclass(frozen=True)
class Shapes:
    """``static``: every dimension of every tensor is a number, and none is 0."""

    static: bool = False


@dataclass(frozen=True)
class Activations:
    """Codes of tensors that depend on inputs.

    ``zero_points``: type -> the values that it may have; a type that is not there may have any. ``moves_keep_codes``:
    what stands around a Transpose, Reshape or the like has one scale and zero point.
    """

    types: Strings = field(default=ANY, metadata=_one_of(*INTEGERS))
    granularity: Strings = field(default=ANY, metadata=_one_of(*GRANULARITIES))
    zero_points: Mapping[str, tuple[int, ...]] = field(default_factory=dict, metadata={"keys": INTEGERS})
    moves_keep_codes: bool = False


@dataclass(frozen=True)
class Weights:
    """Codes of constants that a matrix product reads.

    ``granularity_by_type`` overrides ``granularity``. ``channel_axis``: "output" or "any" axis may have a scale a
    channel. ``zero_point``: "any", "zero", or "zero-by-channel": 0 where there is one scale a channel.
    ``explicit_zero_point``: types whose DequantizeLinear must name a zero point. ``block_sizes``: inputs that share a
    scale; empty for any.
    """

    types: Strings = field(default=ANY, metadata=_one_of(*INTEGERS))
    granularity: Strings = field(default=ANY, metadata=_one_of(*GRANULARITIES))
    granularity_by_type: Mapping[str, Strings] = field(
        default_factory=dict, metadata={"keys": INTEGERS, **_one_of(*GRANULARITIES)}
    )
    channel_axis: str = field(default="any", metadata=_one_of("any", "output"))
    zero_point: str = field(default="any", metadata=_one_of("any", "zero", "zero-by-channel"))
    explicit_zero_point: Strings = field(default=(), metadata=_one_of(*INTEGERS))
    block_sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Linears:
    """Products with quantized weights. ``pairs``: (activation type, weight type).

    ``unit``: a linear is DequantizeLinear, DequantizeLinear -> MatMul -> QuantizeLinear with nothing between.
    ``same_type``: its input and its output have one type. ``max_multiplier``: the largest s_x * s_w / s_y of any
    channel, 0 for no limit. ``max_inputs``: the most inputs that one output sums, 0 for no limit.
    """

    pairs: tuple[tuple[str, str], ...] = field(default=(("any", "any"),), metadata=_one_of(*INTEGERS))
    unit: bool = False
    same_type: bool = False
    max_multiplier: float = 0.0
    max_inputs: int = 0


@dataclass(frozen=True)
class Cache:
    """Keys and values. ``update``: how new ones join the old: "concat", "scatter", "tensor-scatter".

    ``constant_prefix``: the prefix's keys and values must be constants of the graph.
    """

    types: Strings = field(default=ANY, metadata=_one_of(*TYPES))
    update: Strings = field(default=ANY, metadata=_one_of("concat", "scatter", "tensor-scatter"))
    constant_prefix: bool = True


@dataclass(frozen=True)
class Floats:
    """``types``: of tensors that are not quantized; ``[]``: every tensor must be."""

    types: Strings = field(default=ANY, metadata=_one_of(*FLOATS))


@dataclass(frozen=True)
class InputsOutputs:
    """``types``: of the graph's inputs and outputs."""

    types: Strings = field(default=ANY, metadata=_one_of(*TYPES))


@dataclass(frozen=True)
class Operators:
    """``allowed`` and ``refused``: names of operators. ``domains`` beside ONNX's own.

    ``functions``: whether model-local functions may stand in the file. ``max_rank``: operator -> the most dimensions
    of its inputs.
    """

    allowed: Strings = ANY
    refused: Strings = ()
    domains: Strings = ANY
    functions: bool = True
    max_rank: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Soc:
    """One chip. ``number``: what the vendor's compiler calls it. ``overrides``: table -> field -> value."""

    name: str
    number: int = 0
    architecture: str = ""
    title: str = ""
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


SECTIONS: dict[str, type[Any]] = {
    "opset": Opset,
    "shapes": Shapes,
    "activations": Activations,
    "weights": Weights,
    "linears": Linears,
    "cache": Cache,
    "floats": Floats,
    "io": InputsOutputs,
    "operators": Operators,
}


@dataclass(frozen=True)
class Profile:
    """What a target takes.

    ``status``: "compiles" where pq-export runs its compiler, "runs" where it needs none, "exports" where the compiler
    is the user's, "lint-only" where nothing is built. ``precisions``: what may be built for it, such as "w8a8".
    ``built_by``: what ``--target`` makes bundles for it, itself by default. ``soc``: the chip whose overrides are in
    the fields, None before :meth:`for_soc`.
    """

    name: str
    title: str = ""
    executes: str = ""
    status: str = field(default="lint-only", metadata=_exactly("compiles", "runs", "exports", "lint-only"))
    precisions: Strings = field(default=(), metadata=_exactly("w4a4", "w4a8", "w8a8", "w4a16"))
    default_soc: str = ""
    built_by: str = ""
    notes: Strings = ()
    opset: Opset = Opset()
    shapes: Shapes = Shapes()
    activations: Activations = Activations()
    weights: Weights = Weights()
    linears: Linears = Linears()
    cache: Cache = Cache()
    floats: Floats = Floats()
    io: InputsOutputs = InputsOutputs()
    operators: Operators = Operators()
    socs: Mapping[str, Soc] = field(default_factory=dict)
    soc: Soc | None = None

    def for_soc(self, name: str | None = None) -> Profile:
        """This profile as the chip ``name`` (None: the default one, if there is one) changes it."""
        name = name or self.default_soc
        if not name:
            return self
        soc = next((soc for known, soc in self.socs.items() if known.lower() == name.lower()), None)
        if soc is None:
            cure = f"SoCs: {', '.join(self.socs)}." if self.socs else "Leave --soc out: it has no SoCs."
            raise UsageError(f"target {self.name} knows no SoC '{name}'", cure=cure)
        changed = {table: replace(getattr(self, table), **values) for table, values in soc.overrides.items()}
        return replace(self, soc=soc, **changed)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        document = dataclasses.asdict(self)
        document["soc"] = self.soc.name if self.soc else None
        return document


def takes(listed: Strings, value: str) -> bool:
    """Whether ``value`` is among ``listed``."""
    return value in listed or "any" in listed


def takes_pair(listed: tuple[tuple[str, str], ...], activation: str, weight: str) -> bool:
    """Whether a linear of these two types is among ``listed``."""
    return any(a in (activation, "any") and w in (weight, "any") for a, w in listed)


def profile_names() -> list[str]:
    """Those that come with pq-export."""
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def find_profile(name: str | Path) -> Profile:
    """The profile called ``name``, or of the file ``name`` if that ends in ``.toml``.

    Raises :class:`UsageError` with file, table and key for every mistake of a file.
    """
    path = _path_of(name)
    if path is None:
        raise UsageError(
            f"unknown target '{name}'", cure=f"Profiles: {', '.join(profile_names())}, or your own FILE.toml."
        )
    files = _lineage(path)
    merged: dict[str, Any] = {}
    for file in reversed(files):
        _merge(merged, _checked(file))
    return _assembled(merged, files[0])


def _path_of(name: str | Path) -> Path | None:
    if str(name).endswith(".toml"):
        return Path(name)
    path = PROFILES / f"{name}.toml"
    return path if str(name) in profile_names() else None


def _lineage(path: Path) -> list[ProfileFile]:
    """The file and those that it inherits, nearest first."""
    files: list[ProfileFile] = []
    seen: list[Path] = []
    while True:
        file = read_profile_file(path)
        files.append(file)
        seen.append(path.resolve())
        parent = file.content.get("inherits", BASE)
        if not isinstance(parent, str):
            raise file.mistake("inherits", f"is {parent!r}, not a name", 'Write inherits = "static".')
        if parent == ROOT:
            return files
        found = _path_of(path.parent / parent if parent.endswith(".toml") else parent)
        if found is None:
            raise file.mistake(
                "inherits",
                f"names '{parent}', which is no profile",
                f"Profiles: {', '.join(profile_names())}, or a path that ends in .toml.",
            )
        if found.resolve() in seen:
            chain = " -> ".join(p.name for p in [*seen, found])
            raise file.mistake("inherits", f"goes in a circle: {chain}", 'One of them must inherit "static".')
        path = found


def _merge(into: dict[str, Any], content: dict[str, Any]) -> None:
    """Tables key by key, SoCs by name; lists and plain values are replaced."""
    for key, value in content.items():
        if key == "socs":
            socs = into.setdefault("socs", {})
            for name, soc in value.items():
                earlier = socs.get(name, Soc(name))
                overrides = {**earlier.overrides}
                for table, fields in soc.pop("overrides", {}).items():
                    overrides[table] = {**overrides.get(table, {}), **fields}
                socs[name] = replace(earlier, **soc, overrides=overrides)
        elif isinstance(value, dict):
            into.setdefault(key, {}).update(value)
        else:
            into[key] = value


def _assembled(merged: dict[str, Any], file: ProfileFile) -> Profile:
    sections = {name: kind(**merged.pop(name)) for name, kind in SECTIONS.items() if name in merged}
    profile = Profile(**merged, **sections)
    if profile.opset.min > profile.opset.max:
        raise file.mistake("opset.min", f"is {profile.opset.min}, above opset.max, which is {profile.opset.max}")
    if profile.default_soc and profile.default_soc not in profile.socs:
        cure = f"SoCs: {', '.join(profile.socs)}." if profile.socs else "Add a table [socs.NAME]."
        raise file.mistake("default_soc", f"names '{profile.default_soc}', which is none of its SoCs", cure)
    return profile


def _checked(file: ProfileFile) -> dict[str, Any]:
    """The content with every key known and every value of its type."""
    own = {f.name: f for f in dataclasses.fields(Profile) if f.name not in (*SECTIONS, "socs", "soc")}
    hints = get_type_hints(Profile)
    # A child does not bear its parent's names.
    result: dict[str, Any] = dict.fromkeys(("name", "title"), file.path.stem)
    result["built_by"] = file.path.stem if file.path.parent == PROFILES else str(file.path)
    for key, value in file.content.items():
        if key == "inherits":
            continue
        if key in SECTIONS:
            result[key] = file.fields(key, SECTIONS[key], value)
        elif key == "socs":
            result[key] = _socs(file, value)
        elif key in own:
            result[key] = file.value(key, value, hints[key], own[key].metadata)
        else:
            raise file.unknown(key, ["inherits", *own, *SECTIONS, "socs"])
    return result


def _socs(file: ProfileFile, content: Any) -> dict[str, Any]:
    """SoC -> arguments of :class:`Soc`."""
    if not isinstance(content, dict):
        raise file.mistake("socs", "is no table", "Write [socs.NAME] and its keys below.")
    facts = {"number": int, "architecture": str, "title": str}
    result: dict[str, Any] = {}
    for name, soc in content.items():
        where = f"socs.{name}"
        if not isinstance(soc, dict):
            raise file.mistake(where, "is no table", f"Write [{where}] and its keys below.")
        known: dict[str, Any] = {"overrides": {}}
        for key, value in soc.items():
            if key in facts:
                known[key] = file.value(f"{where}.{key}", value, facts[key], {})
            elif key in SECTIONS:
                known["overrides"][key] = file.fields(f"{where}.{key}", SECTIONS[key], value)
            else:
                raise file.unknown(f"{where}.{key}", [*facts, *SECTIONS])
        result[name] = known
    return result
