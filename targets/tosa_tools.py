"""Arm's packages for Ethos-U: Vela, the compiler, and tosa-tools, TOSA's file format and reference model."""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pq_export.errors import PqExportError

# tosa-tools asks for older versions of numpy, ml_dtypes and flatbuffers than others here need, and runs with newer.
INSTALL = "pip install ethos-u-vela==5.2.0 && pip install --no-deps tosa-tools==2026.8.0"
DISTRIBUTIONS = {"ethosu.vela": "ethos-u-vela", "tosa_serializer": "tosa-tools", "tosa_reference_model": "tosa-tools"}


@dataclass(frozen=True)
class Tools:
    """Versions of the packages, and the folders that they are imported from."""

    vela: str
    tosa_tools: str
    folders: tuple[Path, ...]


def find_tools() -> Tools:
    """Vela and TOSA's tools as this Python would import them; an error with pip's line otherwise."""
    folders = []
    for module, distribution in DISTRIBUTIONS.items():
        package = module.split(".")[0]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise PqExportError(
                f"{distribution} is not installed: no module {package}",
                cure=f"Install Arm's compiler and its format: {INSTALL} (both Apache-2.0).",
            )
        folders.append(Path(spec.submodule_search_locations[0]).parent)
    return Tools(_version("ethos-u-vela"), _version("tosa-tools"), tuple(dict.fromkeys(folders)))


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def tosa_module(name: str) -> Any:
    """``tosa_serializer`` or ``tosa_reference_model``."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        find_tools()
        raise PqExportError(f"{name} does not load: {error}", cure=f"Install it again: {INSTALL}") from None


def tools_environment() -> dict[str, str]:
    """Environment of a process that imports the packages from where this one does."""
    paths = [*map(str, find_tools().folders), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
