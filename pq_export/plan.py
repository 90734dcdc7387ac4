"""The resolved plan: every choice of one export, as values, before anything runs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pq_export import __version__
from pq_export.errors import PqExportError, UsageError
from pq_export.precision import Precision


def default_rotate(precision: Precision) -> str:
    """Online Hadamards where activations are quantized; weight-only gains nothing from them (README)."""
    return "offline" if precision.activation_bits == 16 else "online"


@dataclass(frozen=True)
class Plan:
    """Options of one calibration. ``search_*`` are the crops of the scale search, per block.

    Field names are the long options of the command line and the keys of a recipe file.
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

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
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
        return {**asdict(self), "precision": str(self.precision)}

    @property
    def search_length(self) -> int:
        """Tokens of a search crop: never longer than a calibration crop."""
        return min(self.search_seq_len, self.seq_len)

    def fingerprint(self, checkpoint_sha256: str) -> str:
        """Identifies a calibration: same fingerprint, same result. A text file counts by content."""
        facts = {**self.to_dict(), "checkpoint": checkpoint_sha256, "pq_export": __version__}
        data = Path(self.calib_data)
        if data.is_file():
            facts["calib_data"] = hashlib.sha256(data.read_bytes()).hexdigest()
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


RECIPE_KEYS = (*(f.name for f in fields(Plan) if f.name != "num_layers"), "kv")


def read_recipe(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML recipe; unknown keys are refused."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PqExportError(f"cannot be read: {error.strerror}", where=path) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PqExportError(f"is not YAML ({' '.join(str(error).split())})", where=path) from None
    if not isinstance(content, dict):
        raise PqExportError("is not a mapping of options", where=path, cure=f"Keys: {', '.join(RECIPE_KEYS)}.")
    content = {str(key).replace("-", "_"): value for key, value in content.items()}
    if unknown := sorted(set(content) - set(RECIPE_KEYS)):
        raise PqExportError(f"has an unknown key '{unknown[0]}'", where=path, cure=f"Keys: {', '.join(RECIPE_KEYS)}.")
    return content


def resolve_plan(precision: str | None, kv: int | None, recipe: Path | None, **options: Any) -> Plan:
    """Explicit options over the recipe's over the defaults. ``None`` means 'not given'."""
    content = read_recipe(recipe) if recipe else {}
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
        raise UsageError(f"an option has the wrong type ({error})", where=recipe or "") from None
