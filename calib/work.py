"""Finished parts of a calibration, kept beside its output so that an interrupted run goes on from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pq_export.calib.block import LayerScales
from pq_export.files import errors_of, write_atomically

GROUPS = ("activation", "kv", "weight", "codes", "parameters")  # of a LayerScales, as they lie in its file


class WorkDirectory:
    """``<output>.work``: one file a finished stage, all of one fingerprint.

    Files of another fingerprint are of another plan or checkpoint and are thrown away. A file that does
    not read back is treated as not there.
    """

    def __init__(self, output: Path, fingerprint: str):
        self.path, self.fingerprint = output.with_name(f"{output.name}.work"), fingerprint

    def open(self) -> None:
        """Make the directory, or keep the one that is there if it has this fingerprint."""
        if self._read_json("fingerprint") != self.fingerprint:
            self.remove()
            with errors_of(self.path):
                self.path.mkdir(parents=True)
            self._write_json("fingerprint", self.fingerprint)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _read_json(self, name: str) -> Any:
        try:
            return json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _write_json(self, name: str, content: Any) -> None:
        write_atomically(self.path / f"{name}.json", json.dumps(content).encode())

    def load(self, name: str) -> dict[str, Any] | None:
        """A stage's result, or None if it has not finished."""
        return self._read_json(name)

    def save(self, name: str, result: dict[str, Any]) -> None:
        self._write_json(name, result)

    def load_layer(self, index: int, tag: str, device: torch.device | str = "cpu") -> LayerScales | None:
        """Layer ``index`` as :meth:`save_layer` kept it under ``tag``, or None."""
        name = f"layer{index:03d}.{tag}"
        document, path = self._read_json(name), self.path / f"{name}.safetensors"
        if document is None or not path.is_file():
            return None
        try:
            tensors = safetensors.torch.load(path.read_bytes())
        except (OSError, safetensors.SafetensorError):
            return None
        groups: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
        for key, tensor in tensors.items():
            group, _, own = key.partition("/")
            groups[group][own] = tensor.to(device)
        return LayerScales(**groups, factors=document["factors"], error=document["error"])

    def save_layer(self, index: int, tag: str, found: LayerScales) -> None:
        """Keep a layer under ``tag``. A later step uses another tag, so no file is ever replaced by another state."""
        tensors = {
            f"{group}/{name}": tensor.cpu().contiguous()
            for group in GROUPS
            for name, tensor in getattr(found, group).items()
        }
        name = f"layer{index:03d}.{tag}"
        write_atomically(self.path / f"{name}.safetensors", safetensors.torch.save(tensors))
        self._write_json(name, {"factors": found.factors, "error": found.error})

    def drop_layer(self, index: int, tag: str) -> None:
        """Remove a state that another one has replaced."""
        for suffix in ("safetensors", "json"):
            (self.path / f"layer{index:03d}.{tag}.{suffix}").unlink(missing_ok=True)

    def load_tensors(self, name: str) -> dict[str, Tensor] | None:
        try:
            return safetensors.torch.load((self.path / f"{name}.safetensors").read_bytes())
        except (OSError, safetensors.SafetensorError):
            return None

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        contiguous = {key: torch.clone(tensor).contiguous() for key, tensor in tensors.items()}
        write_atomically(self.path / f"{name}.safetensors", safetensors.torch.save(contiguous))
