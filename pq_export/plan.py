"""The resolved plan: every choice of one export, as values, before anything runs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pq_export import __version__
from pq_export.errors import UsageError
from pq_export.precision import Precision

PREFIX_ROOM = 16  # tokens of the model's context that are left to prefixes


def default_rotate(precision: Precision) -> str:
    """Online Hadamards where activations are quantized; weight-only gains nothing from them (README)."""
    return "offline" if precision.activation_bits == 16 else "online"


@dataclass(frozen=True)
class Plan:
    """Options of one calibration. ``search_*`` are the crops of the scale search, per block.

    Field names are the long options of the command line and the keys of a recipe file. ``steps``: what is done
    to the quantized model, in order, as (name, options); ``pq_export.calib.recipe`` knows them.
    """

    precision: Precision
    prefix: str = "auto"
    rotate: str = "online"
    calib_data: str = "builtin"
    calib_samples: int = 32
    seq_len: int = 512
    search_samples: int = 8
    search_seq_len: int = 256
    seed: int = 0
    num_layers: int | None = None
    steps: tuple[tuple[str, dict[str, Any]], ...] = (("clip_search", {}),)

    def __post_init__(self) -> None:
        for field in fields(self)[1:-1]:
            value = getattr(self, field.name)
            expected = int if "int" in str(field.type) else str
            if not (isinstance(value, expected) and not isinstance(value, bool)) and field.default is not value:
                kind = "a whole number" if expected is int else "text"
                raise UsageError(f"{field.name} is {value!r}, not {kind}")
        if self.rotate not in ("online", "offline", "none"):
            raise UsageError(f"--rotate {self.rotate} is not possible", cure="Use online, offline or none.")
        for name, least in (
            ("calib_samples", 1),
            ("seq_len", 16),
            ("search_samples", 1),
            ("search_seq_len", 16),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}")
        if not self.prefix:
            raise UsageError("--prefix is empty", cure="Use auto, none, or the text of the prefix.")

    def to_dict(self) -> dict[str, Any]:
        """For JSON, and equal to what is read back from it."""
        steps = [[name, dict(options)] for name, options in self.steps]
        return {**asdict(self), "precision": str(self.precision), "steps": steps}

    @property
    def search_length(self) -> int:
        """Tokens of a search crop: never longer than a calibration crop."""
        return min(self.search_seq_len, self.seq_len)

    def fingerprint(self, checkpoint_sha256: str) -> str:
        """Identifies a calibration: same fingerprint, same result. A text file counts by content."""
        facts = {**self.to_dict(), "checkpoint": checkpoint_sha256, "pq_export": __version__}
        whole = Path(self.calib_data)
        parts = [whole] if whole.is_file() else [Path(name.strip()) for name in self.calib_data.split(",")]
        facts["calib_data"] = [hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else str(p) for p in parts]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


PLAN_KEYS = tuple(f.name for f in fields(Plan) if f.name not in ("num_layers", "steps"))


def resolve_plan(precision: str | None, kv: int | None, recipe: dict[str, Any], **options: Any) -> Plan:
    """Explicit options over the recipe's over the defaults. ``None`` means 'not given'."""
    content = dict(recipe)
    given = {name: value for name, value in options.items() if value is not None}
    name = precision or content.pop("precision", None)
    content.pop("precision", None)
    if name is None:
        raise UsageError("no precision was given", cure="Add --w4a4, --w4a8, --w8a8 or --w4a16.")
    resolved = Precision.named(str(name).lower(), kv if kv is not None else content.get("kv"))
    content.pop("kv", None)
    plan = Plan(resolved, rotate=default_rotate(resolved))
    try:
        return replace(plan, **{**content, **given})
    except TypeError as error:
        raise UsageError(f"an option has the wrong type ({error})") from None
