"""The bundle: a folder to ship, and the checks that it is whole.

::

    model.onnx [+ model.onnx.data]   the graph; weights outside it above 2 GB
    config.json, generation_config.json, tokenizer files, chat template   as Hugging Face has them
    pq_config.json                   precision, prefix, scales, hashes, versions
    report.json, report.html         what was done and measured (times differ from run to run)

Everything but the report depends on checkpoint, plan, target and versions alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from pq_export import __version__
from pq_export.calibration import ASSETS_NAME, Calibration
from pq_export.errors import IntegrityError
from pq_export.precision import Precision
from pq_export.quantizer import code_range

FORMAT = "pq-export/bundle"
SCHEMA_VERSION = 1
# Of pq_config.json's entries.
KINDS = {"target": str, "form": str, "precision": str, "source": dict, "prefix": dict, "kv_cache": dict}
MODEL_NAME, DATA_NAME, CONFIG_NAME = "model.onnx", "model.onnx.data", "pq_config.json"
EXTERNAL_DATA_ABOVE = 2 * 1024**3 - 64 * 1024**2  # a protobuf cannot pass 2 GiB; leave room for the graph
EXTERNAL_TENSOR_ABOVE = 1024  # bytes; smaller initializers stay in the graph, readable in any viewer


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its ``pq_config.json``."""

    directory: Path
    config: dict[str, Any]

    @property
    def model_path(self) -> Path:
        return self.directory / MODEL_NAME

    @property
    def float_type(self) -> str:
        """Of the graph's arithmetic: "fp32", or "fp16" where a target asked for it."""
        return str(self.config.get("deploy", {}).get("float_type", "fp32"))

    @property
    def overrides(self) -> dict[str, int]:
        """Bits that differ from the bundle's precision, see :class:`Calibration`; empty in older bundles."""
        return dict(self.config.get("overrides", {}))

    @property
    def max_weight_bits(self) -> int:
        """The most bits that weights of a linear have."""
        weights = [bits for name, bits in self.overrides.items() if name.endswith("_proj")]
        return max([Precision.parse(self.config["precision"]).weight_bits, *weights])


def write_bundle(
    directory: Path,
    model: onnx.ModelProto,
    calibration: Calibration,
    calibration_directory: Path,
    *,
    target: str,
    form: str,
    form_reason: str,
    external_data: bool | None = None,
    finish: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {},
) -> None:
    """Write all files but the report into ``directory`` (the caller renames it into place).

    ``external_data``: None puts weights beside the graph only where they must be, above 2 GB. ``finish(config)`` may
    write more files, and returns what the configuration says of them.
    """
    sizes = size_by_part(model)
    shutil.copytree(calibration_directory / ASSETS_NAME, directory, dirs_exist_ok=True)
    save_model(model, directory / MODEL_NAME, external_data)
    config = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "pq_export": __version__,
        "target": target,
        "form": form,
        "form_reason": form_reason,
        "precision": str(calibration.precision),
        "overrides": calibration.overrides,
        "source": asdict(calibration.source),
        "rotation": asdict(calibration.rotation),
        "prefix": {
            "token_ids": calibration.prefix.token_ids,
            "tokens": calibration.prefix.tokens,
            "length": len(calibration.prefix.token_ids),
            "key": calibration.prefix.key,
        },
        "calibration_sha256": calibration_sha256(calibration),
        "bos_token_id": calibration.bos_token_id,
        "max_position_embeddings": calibration.decoder.max_position_embeddings,
        "num_layers": calibration.decoder.num_layers,
        "kv_cache": kv_cache_facts(calibration, model),
        "scales": scales_summary(calibration),
        "sizes": sizes,
        "plan": calibration.plan,
        "versions": versions(),
    }
    config |= finish(config)
    files = {p.relative_to(directory).as_posix(): file_record(p) for p in sorted(directory.rglob("*")) if p.is_file()}
    config["files"] = files
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def save_model(model: onnx.ModelProto, path: Path, external_data: bool | None) -> None:
    """Write ``model`` and, where needed or asked for, its weights beside it."""
    size = sum(len(t.raw_data) for t in model.graph.initializer)
    outside = size > EXTERNAL_DATA_ABOVE if external_data is None else external_data
    if outside:
        onnx.save(
            model,
            path,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=DATA_NAME,
            size_threshold=EXTERNAL_TENSOR_ABOVE,
        )
    else:
        onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=not _has_plugin_nodes(model))


def _has_plugin_nodes(model: onnx.ModelProto) -> bool:
    """Nodes without a definition in the file, whose types no checker can infer."""
    defined = {(function.domain, function.name) for function in model.functions}
    return any(n.domain not in ("", "com.microsoft") and (n.domain, n.op_type) not in defined for n in model.graph.node)


def kv_cache_facts(calibration: Calibration, model: onnx.ModelProto) -> dict[str, Any]:
    """Bits and bytes of the cache per token, as the inputs of ``model`` hold it and in FP16.

    Where tensors of the cache have different bits, ``tensors`` has those of each input: bits, container, zero point.
    """
    c = calibration
    values = c.decoder.num_kv_heads * c.decoder.head_dim
    inputs = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    tensors = {}
    for site in c.kv_sites():
        name = site.replace("layers", "past_key_values").replace("self_attn.", "")
        tensors[name] = _cache_tensor(c.kv_bits(site), np.dtype(onnx.helper.tensor_dtype_to_np_dtype(inputs[name])))
    facts: dict[str, Any] = {
        "bits": c.precision.kv_bits,
        "container": " and ".join(sorted({tensor["container"] for tensor in tensors.values()})),
        "bytes_per_token": sum(values * np.dtype(tensor["container"]).itemsize for tensor in tensors.values()),
        "fp16_bytes_per_token": values * 2 * len(tensors),
        "heads": c.decoder.num_kv_heads,
        "head_dim": c.decoder.head_dim,
    }
    if any(tensor["bits"] != c.precision.kv_bits for tensor in tensors.values()):
        facts["tensors"] = tensors
    return facts


def _cache_tensor(bits: int, container: np.dtype[Any]) -> dict[str, Any]:
    """How one cache input holds its keys or values."""
    zero_point = None if bits == 16 else -code_range(bits)[0] if container == np.uint8 else 0
    return {"bits": bits, "container": container.name, "zero_point": zero_point}


def scales_summary(calibration: Calibration) -> dict[str, dict[str, float]]:
    """Smallest and largest scale over the layers, by kind of site."""
    groups: dict[str, list[float]] = {}
    for name, scale in calibration.activation_scales.items():
        groups.setdefault(name.split(".", 2)[2], []).append(scale)
    for name, scales in calibration.kv_scales.items():
        groups.setdefault(name.split(".", 2)[2], []).extend(scales)
    for name in calibration.linear_names():
        groups.setdefault(f"{name.split('.', 2)[2]}.weight", []).extend(calibration.tensors[f"{name}.scale"].tolist())
    return {name: {"min": min(values), "max": max(values)} for name, values in groups.items()}


def calibration_sha256(calibration: Calibration) -> str:
    """Hash of all numbers of a calibration that a graph is made of: the same, whatever found or saved them.

    Weights and their scales, rotation, RoPE and prefix tokens are in the prefix's key; that leaves out the prefix KV,
    which may have been tuned, and the static scales.
    """
    c = calibration
    numbers = [c.prefix.key, str(c.precision), c.overrides, c.activation_scales, c.kv_scales]
    digest = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode())
    for tensor in (tensor for pair in c.prefix_kv() or () for tensor in pair):
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


def size_by_part(model: onnx.ModelProto) -> list[dict[str, Any]]:
    """Bytes in the file by part; quantized linears also by parameter (codes and scales together)."""
    parts: dict[str, int] = {}
    parameters = 0
    packed = {n.input[1]: {a.name: a.i for a in n.attribute} for n in model.graph.node if n.op_type == "QLinear"}
    for tensor in model.graph.initializer:
        name, size = tensor.name, initializer_bytes(tensor)
        if ".prefix." in name:
            part = "prefix KV"
        elif ("_proj." in name or "_input." in name) and not name.endswith((".zero_point", ".max")):
            part = "quantized linears"
            if name.endswith(".codes"):
                parameters += int(np.prod(tensor.dims))
            elif name in packed:  # in tiles: padded
                parameters += packed[name]["K"] * packed[name]["N"]
        elif name.startswith(("embed_tokens", "lm_head")):
            part = "lm_head" if name.startswith("lm_head") else "embedding"
        else:
            part = "rotary tables" if name.startswith("rotary.") else "other"
        parts[part] = parts.get(part, 0) + size
    return [
        {
            "part": part,
            "bytes": size,
            **(
                {"parameters": parameters, "bytes_per_parameter": size / parameters}
                if part == "quantized linears" and parameters
                else {}
            ),
        }
        for part, size in parts.items()
    ]


def initializer_bytes(tensor: TensorProto) -> int:
    """Bytes of an initializer in the file, packed types counted as packed."""
    count = int(np.prod(tensor.dims))
    if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
        return (count + 1) // 2
    return count * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize


def file_record(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def versions() -> dict[str, str]:
    """Versions of the packages that shape a bundle."""
    names = ("torch", "transformers", "onnx", "onnxscript", "onnx-graphsurgeon", "onnxruntime")
    return {name: metadata.version(name) for name in names}


def open_bundle(directory: Path, verify_hashes: bool = True) -> Bundle:
    """Read ``pq_config.json`` and check that every file is there and unaltered.

    External data is resolved before anything opens it: a location outside the bundle is refused.
    """
    path = directory / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IntegrityError(
            "is not a bundle: it has no pq_config.json",
            where=directory,
            cure="Give the directory that 'pq-export ... -o' wrote.",
        ) from None
    except (OSError, ValueError) as error:
        raise IntegrityError(f"cannot be read: {error}", where=path, cure="Build the bundle again.") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise IntegrityError("is not a pq-export bundle", where=path)
    if not isinstance(config.get("schema_version"), int) or config["schema_version"] > SCHEMA_VERSION:
        raise IntegrityError(
            f"has schema version {config.get('schema_version')}; this pq-export reads up to {SCHEMA_VERSION}",
            where=path,
            cure="Upgrade pq-export or build again.",
        )
    if not isinstance(config.get("files"), dict) or MODEL_NAME not in config["files"]:
        raise IntegrityError("does not list its files", where=path, cure="Build the bundle again.")
    _check_kinds(config, path)
    for name, record in config["files"].items():
        _check_file(directory, name, record, verify_hashes)
    _check_external_data(directory, set(config["files"]))
    return Bundle(directory, config)


def _check_kinds(config: dict[str, Any], path: Path) -> None:
    """What every reader relies on, so that a file changed by hand is one line."""
    prefix, records = config.get("prefix"), config["files"].values()
    usable = {name: isinstance(config.get(name), kind) for name, kind in KINDS.items()}
    usable["prefix.length"] = isinstance(prefix, dict) and isinstance(prefix.get("length"), int)
    usable["files"] = all(isinstance(record, dict) and {"bytes", "sha256"} <= set(record) for record in records)
    if missing := [name for name, fine in usable.items() if not fine]:
        raise IntegrityError(f"has no usable {missing[0]}", where=path, cure="Build the bundle again.")


def _check_file(directory: Path, name: str, record: dict[str, Any], verify_hashes: bool) -> None:
    if not _inside(name):
        raise IntegrityError(f"lists '{name}', which lies outside the bundle", where=directory / CONFIG_NAME)
    file = directory / name
    if not file.is_file():
        raise IntegrityError("is missing from the bundle", where=file, cure="Copy or build the bundle again.")
    if file.stat().st_size != record["bytes"] or (verify_hashes and file_record(file) != record):
        raise IntegrityError(
            "was altered: it does not match pq_config.json", where=file, cure="Copy or build the bundle again."
        )


def _check_external_data(directory: Path, listed: set[str]) -> None:
    try:
        model = onnx.load(directory / MODEL_NAME, load_external_data=False)
    except Exception as error:  # protobuf raises its own DecodeError
        raise IntegrityError(f"is not an ONNX model ({type(error).__name__})", where=directory / MODEL_NAME) from None
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and (not _inside(entry.value) or entry.value not in listed):
                raise IntegrityError(
                    f"initializer {tensor.name} points to external data '{entry.value}', which is "
                    "not a file of this bundle",
                    where=directory / MODEL_NAME,
                )


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name
