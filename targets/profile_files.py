"""Profile files: TOML in, checked values out. Every mistake is one line that names file, table and key."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pq_export.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class ProfileFile:
    """One file as it was read. Keys are written with their tables: ``socs.sm8650.floats.types``."""

    path: Path
    content: dict[str, Any]

    def mistake(self, key: str, what: str, cure: str = "") -> UsageError:
        """The error for ``key``."""
        return UsageError(f"{key} {what}", where=self.path, cure=cure)

    def unknown(self, key: str, known: Iterable[str]) -> UsageError:
        """The error for a key that no profile has."""
        names = list(known)
        close = difflib.get_close_matches(key.rpartition(".")[2], names, n=1)
        cure = f"Did you mean '{close[0]}'?" if close else f"There are: {', '.join(names)}."
        return self.mistake(key, "is no key of a profile", cure)

    def fields(self, table: str, kind: type[Any], content: Any) -> dict[str, Any]:
        """``content`` as arguments of the dataclass ``kind``; keys that are not there are left out."""
        if not isinstance(content, dict):
            raise self.mistake(table, "is no table", f"Write [{table}] and its keys below.")
        fields, hints = {f.name: f for f in dataclasses.fields(kind)}, get_type_hints(kind)
        values = {}
        for key, value in content.items():
            if key not in fields:
                raise self.unknown(f"{table}.{key}", fields)
            values[key] = self.value(f"{table}.{key}", value, hints[key], fields[key].metadata)
        return values

    def value(self, key: str, value: Any, hint: Any, rules: Mapping[str, Any]) -> Any:
        """``value`` as the type ``hint``. ``rules``: ``choices`` of words, ``keys`` of a table."""
        if get_origin(hint) is tuple:
            return self._list(key, value, hint, rules)
        if get_origin(hint) is not None:  # Mapping[str, ...]
            if not isinstance(value, dict):
                raise self.mistake(key, f"is {value!r}, not a table", f"Write {key} = {{ name = ... }}.")
            inner = get_args(hint)[1]
            for name in value:
                if rules.get("keys") and name not in rules["keys"]:
                    raise self.unknown(f"{key}.{name}", rules["keys"])
            return {name: self.value(f"{key}.{name}", item, inner, rules) for name, item in value.items()}
        return self._plain(key, value, hint, rules)

    def _list(self, key: str, value: Any, hint: Any, rules: Mapping[str, Any]) -> Any:
        inner = get_args(hint)
        if not isinstance(value, list):
            raise self.mistake(key, f"is {value!r}, not a list", f"Write {key.rpartition('.')[2]} = [ ... ].")
        if inner[-1] is not Ellipsis:  # a fixed number of words
            if len(value) != len(inner):
                raise self.mistake(key, f"has {len(value)} entries, not {len(inner)}")
            return tuple(self._plain(key, item, str, rules) for item in value)
        return tuple(self.value(f"{key}[{index}]", item, inner[0], rules) for index, item in enumerate(value))

    def _plain(self, key: str, value: Any, hint: Any, rules: Mapping[str, Any]) -> Any:
        names = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
        fits = isinstance(value, (int, float) if hint is float else hint)
        if not fits or (isinstance(value, bool) and hint is not bool):
            raise self.mistake(key, f"is {value!r}, not {names[hint]}")
        if hint in (int, float) and key.split(".")[-1].startswith("max") and not value >= 0:
            raise self.mistake(key, f"is {value}", "A limit is 0, which is none, or positive.")
        choices = rules.get("choices", ())
        if hint is str and choices and value not in choices and (value != "any" or rules.get("exactly")):
            raise self.mistake(key, f"is '{value}'", f"There are: {', '.join(choices)}.")
        return float(value) if hint is float else value


def read_profile_file(path: Path) -> ProfileFile:
    """Read ``path``; raises :class:`UsageError` where it is missing or is not TOML."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("there is no such profile file", where=path, cure="See docs/profiles.md.") from None
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=path) from None
    except UnicodeDecodeError:
        raise UsageError("is not TOML (not UTF-8 text)", where=path) from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"is not TOML ({error})", where=path) from None
    except RecursionError:
        raise UsageError("is nested too deeply", where=path) from None
    return ProfileFile(path, content)
