"""Recipes: which steps a calibration takes, with their options, as a short YAML file.

    calib_samples: 32          # any option of the command line, by its long name
    steps:                     # in order; see pq_export.calib.steps for what there is
      - clip_search
      - gptq: {damping: 0.01}

What is wrong with a recipe is said with the line it stands on.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from pq_export.calib.clip_search import ClipSearchOptions
from pq_export.calib.steps import STEPS, Phase, StepKind
from pq_export.errors import PqExportError, UsageError
from pq_export.plan import PLAN_KEYS, Plan
from pq_export.precision import Precision

DIRECTORY = Path(__file__).parent / "recipes"
DEFAULT = "default"
ROUNDING = ("gptq", "learned_rounding", "tune_blocks")  # steps that choose codes
# (later, earlier): what the later one leaves is not what the earlier one starts from.
IMPOSSIBLE = (("smooth", "learn_rotations"), ("tune_blocks", "gptq"), ("learned_rounding", "gptq"))
RECIPE_KEYS = (*PLAN_KEYS, "kv", "steps")


def recipe_names() -> list[str]:
    """Recipes that come with the package."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def load_recipe(name: str | None) -> dict[str, Any]:
    """Options of the recipe ``name`` (shipped, or a YAML file), with ``steps`` as (name, options) pairs, checked.

    A file without steps takes the default recipe's.
    """
    name = name or DEFAULT
    shipped = DIRECTORY / f"{name}.yaml"
    path = shipped if name in recipe_names() else Path(name)
    if not path.is_file() and path.suffix not in (".yaml", ".yml"):
        raise PqExportError(
            "is neither a recipe nor a file", where=name, cure=f"Use {', '.join(recipe_names())} or a YAML file."
        )
    content = read_recipe(path)
    return content if "steps" in content else {**content, "steps": read_recipe(DIRECTORY / f"{DEFAULT}.yaml")["steps"]}


def read_recipe(path: Path) -> dict[str, Any]:
    """Keys and values of a recipe file; raises :class:`PqExportError` with file and line."""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise PqExportError(f"cannot be read: {error.strerror}", where=path) from None
    except UnicodeDecodeError:
        raise PqExportError("is not YAML (not UTF-8 text)", where=path) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = path if mark is None else f"{path}:{mark.line + 1}"
        raise PqExportError(f"is not YAML ({' '.join(str(error).split())})", where=where) from None
    if not isinstance(node, yaml.MappingNode):
        raise PqExportError("is not a mapping of options", where=path, cure=f"Keys: {', '.join(RECIPE_KEYS)}.")
    content: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(_value(key_node, path)).replace("-", "_")
        where = _where(path, key_node)
        if key not in RECIPE_KEYS:
            raise PqExportError(f"unknown key '{key}'", where=where, cure=_did_you_mean(key, RECIPE_KEYS))
        if key in content:
            raise PqExportError(f"'{key}' stands here a second time", where=where, cure="Keep one of them.")
        if key == "steps":
            content[key] = _steps(value_node, path)
        else:
            content[key] = _value(value_node, path)
            _check_plan_value(key, content[key], where)
    return content


def _check_plan_value(key: str, value: Any, where: str) -> None:
    """Raise what :class:`Plan` and :class:`Precision` say of a value by itself, with its line."""
    try:
        if key == "precision":
            Precision.named(str(value).lower())
        elif key == "kv":
            Precision.named("w4a4", value)
        else:
            Plan(Precision.named("w4a4"), **{key: value})
    except UsageError as error:
        raise PqExportError(error.what, where=where, cure=error.cure) from None


class StepError(UsageError):
    """A step cannot do its work: with these other options, or on this model."""

    def __init__(self, what: str, *, where: object = "", cure: str = "", step: str = ""):
        super().__init__(what, where=where, cure=cure)
        self.step = step

    def in_recipe(self, name: str | None) -> StepError:
        """The same with file and line, where the recipe ``name`` is a file that lists the step."""
        path = Path(name or DEFAULT)
        if not path.is_file():
            return self
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        assert isinstance(node, yaml.MappingNode)  # it was read before
        lists = [value for key, value in node.value if key.value == "steps"]
        for item in lists[0].value if lists else ():
            named = item.value[0][0] if isinstance(item, yaml.MappingNode) else item
            if named.value == self.step:
                return StepError(self.what, where=_where(path, item), cure=self.cure, step=self.step)
        return self


def kinds_and_options(plan: Plan) -> list[tuple[StepKind, Any]]:
    """The steps of a plan as kinds with their options objects."""
    return [(STEPS[name], STEPS[name].options(**options)) for name, options in plan.steps]


def _steps(node: yaml.Node, path: Path) -> tuple[tuple[str, dict[str, Any]], ...]:
    if not isinstance(node, yaml.SequenceNode):
        raise PqExportError("'steps' is not a list", where=_where(path, node), cure="Write '- gptq' a line.")
    steps: list[tuple[str, dict[str, Any]]] = []
    phase = Phase.WEIGHTS
    for item in node.value:
        where, value = _where(path, item), _value(item, path)
        if isinstance(item, yaml.MappingNode) and len(value) < len(item.value):
            raise PqExportError("a step stands twice in one item", where=where, cure="Keep one of them.")
        name, options = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (value, {})
        if not isinstance(name, str) or name not in STEPS:
            raise PqExportError(f"unknown step '{name}'", where=where, cure=_did_you_mean(str(name), tuple(STEPS)))
        kind = STEPS[name]
        if kind.phase < phase:
            raise PqExportError(
                f"step '{name}' cannot come after '{steps[-1][0]}'",
                where=where,
                cure=f"Order: {_order()}.",
            )
        if kind.after and not {done for done, _ in steps} & set(kind.after):
            raise PqExportError(
                f"step '{name}' needs {' or '.join(kind.after)} before it", where=where, cure="Add it to the recipe."
            )
        checked = _options(kind, options, item, path)
        _check_order(name, checked, steps, where)
        steps.append((name, checked))
        phase = kind.phase
    if not {"clip_search"} & {name for name, _ in steps}:
        raise PqExportError("no step finds scales", where=_where(path, node), cure="Add clip_search.")
    return tuple(steps)


def _check_order(name: str, options: dict[str, Any], before: list[tuple[str, dict[str, Any]]], where: str) -> None:
    """Refuse a step that would find nothing to work on, or undo what an earlier one did."""
    names = [step for step, _ in before]
    if name == "clip_search":
        searched = ClipSearchOptions(**options)
        if name not in names and not (searched.weights and searched.kv and searched.activations):
            raise PqExportError(
                "the first clip_search must find all scales", where=where, cure="Leave its options out."
            )
        if searched.weights and (later := next((n for n in names if n in ROUNDING), None)):
            raise PqExportError(
                f"clip_search would round the weights of '{later}' anew", where=where, cure="Set 'weights: false'."
            )
    elif name in names:
        raise PqExportError(f"step '{name}' stands here a second time", where=where, cure="Keep one of them.")
    for late, early in IMPOSSIBLE:
        if name == early and late in names:
            raise PqExportError(f"step '{early}' cannot come after '{late}'", where=where, cure="Put it before.")


def _options(kind: StepKind, options: Any, item: yaml.Node, path: Path) -> dict[str, Any]:
    """Options of one step, checked against its dataclass: names, types, and what its constructor refuses."""
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise PqExportError(f"options of step '{kind.name}' are no mapping", where=_where(path, item))
    lines = _option_lines(item, path)
    types_of = typing.get_type_hints(kind.options)
    for key, value in options.items():
        where = f"{path}:{lines.get(str(key), item.start_mark.line + 1)}"
        if key not in types_of:
            cure = _did_you_mean(str(key), tuple(types_of))
            raise PqExportError(f"step '{kind.name}' has no option '{key}'", where=where, cure=cure)
        if not _fits(value, types_of[key]):
            expected = _type_name(types_of[key])
            cure = f"YAML reads it as text: write {float(value)!r}." if _is_number(value) else ""
            raise PqExportError(f"{kind.name}: {key} is {value!r}, not {expected}", where=where, cure=cure)
        _construct(kind, {key: value}, where)
    _construct(kind, options, _where(path, item))  # what each allows alone they may not allow together
    return dict(options)


def _construct(kind: StepKind, options: dict[str, Any], where: str) -> None:
    try:
        kind.options(**options)
    except (ValueError, PqExportError) as error:
        raise PqExportError(f"{kind.name}: {getattr(error, 'what', error)}", where=where) from None


def _option_lines(item: yaml.Node, path: Path) -> dict[str, int]:
    """Line of each option of a step, counted from 1; each may stand there once."""
    lines: dict[str, int] = {}
    if isinstance(item, yaml.MappingNode) and isinstance(item.value[0][1], yaml.MappingNode):
        for key, _ in item.value[0][1].value:
            if str(key.value) in lines:
                what = f"'{key.value}' stands here a second time"
                raise PqExportError(what, where=_where(path, key), cure="Keep one of them.")
            lines[str(key.value)] = key.start_mark.line + 1
    return lines


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(kind))
    origin = typing.get_origin(kind)
    if origin in (tuple, list):
        return isinstance(value, list) and all(_fits(v, typing.get_args(kind)[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict)
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _is_number(value: Any) -> bool:
    """Text that is a number to everyone but YAML 1.1, such as 1e-3."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(one) for one in typing.get_args(kind))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(kind, "a list" if typing.get_origin(kind) in (tuple, list) else "a mapping")


def _value(node: yaml.Node, path: Path) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that is none
        raise PqExportError(f"is not YAML ({' '.join(str(error).split())})", where=_where(path, node)) from None


def _where(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _did_you_mean(name: str, names: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, names, 1)
    return f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(names)}."


def _order() -> str:
    """All steps, phase by phase."""
    return ", then ".join("/".join(k.name for k in STEPS.values() if k.phase is p) for p in Phase)
