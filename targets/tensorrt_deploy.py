"""What lies beside the graph in a TensorRT bundle.

::

    deploy/build_engine.sh      trtexec with the profiles of prefill and decode; compiles plugin and runner first
    deploy/chat.json            the chat template as literal pieces, for the runner
    deploy/tokenizer_checks.json  texts and their token ids, which the runner's tokenizer must repeat
    deploy/libpq.so             the plugin, where it was built for this GPU and this machine
    plugin/                     sources of the plugin and of the runner
"""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import jinja2

from pq_export.errors import PqExportError
from pq_export.plugins.abi import SOURCE_DIRECTORY
from pq_export.plugins.build import find_library
from pq_export.plugins.toolchain import ARCHITECTURES
from pq_export.rewrite.qlinear import Form
from pq_export.stages import Stages
from pq_export.targets.base import TargetOptions
from pq_export.targets.chat import chat_pieces
from pq_export.targets.rtx_engines import needed_memory
from pq_export.targets.tensorrt_levels import Level
from pq_export.targets.tensorrt_options import Profile

JETSONS = (87, 110)  # 64-bit Arm
TEMPLATES = Path(__file__).with_name("templates")
SOURCES = ("csrc", "runner")
CHECKED_TEXTS = (
    "Hello, world!",
    "  two  spaces,\ttab\nnew line\r\n\n\nend ",
    "It's 12,345.67 o'clock; we'LL see: they've",
    "def f(x):\n    return x**2  # ½",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f642 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u00a0\u2003",
)
SOURCE_FILES = ("CMakeLists.txt", "CMakePresets.json", "NOTES.md")


def write_deployment(
    directory: Path,
    config: dict[str, Any],
    options: TargetOptions,
    profiles: list[Profile],
    level: Level,
    stages: Stages,
) -> dict[str, Any]:
    """Write the files into ``directory``; returns what ``pq_config.json`` says of them."""
    deploy = directory / "deploy"
    deploy.mkdir()
    plugin = config["form"] == Form.PLUGIN.value
    copy_sources(directory / "plugin")
    write_text_files(directory, stages)
    library = _add_library(deploy, options) if plugin else None
    script = _script(config, options, profiles, level, plugin, needed_memory(directory / "model.onnx"))
    (deploy / "build_engine.sh").write_text(script, encoding="utf-8")
    (deploy / "build_engine.sh").chmod(0o755)
    remaining = "run deploy/build_engine.sh on the board" if is_jetson(options) else "run deploy/build_engine.sh there"
    found: dict[str, Any] = {"deploy": deploy_facts(config, options, level.name, remaining)}
    if library is not None:
        found["plugin"] = library
    return found


def deploy_facts(
    config: dict[str, Any], options: TargetOptions, tensorrt: str, remaining: str | None
) -> dict[str, Any]:
    """What the bundle is for. ``remaining``: what is left to do before it runs.

    ``cache_copied_bytes``: what a step writes of past keys and values, with a full cache and the largest batch.
    """
    assert options.max_batch_size and options.max_seq_len
    copied = config["kv_cache"]["bytes_per_token"] * (options.max_seq_len - 1) * options.max_batch_size
    return {
        "sms": list(options.sms),
        "jetpack": options.jetpack,
        "tensorrt": tensorrt,
        "float_type": options.float_type,
        "max_batch_size": options.max_batch_size,
        "max_input_len": options.max_input_len,
        "max_seq_len": options.max_seq_len,
        "cache_updates": "copied: each step writes present, past and the new tokens, to another buffer",
        "cache_copied_bytes": copied,
        "remaining": remaining,
    }


def is_jetson(options: TargetOptions) -> bool:
    return min(options.sms) in JETSONS


def copy_sources(target: Path) -> None:
    """The plugin's and the runner's sources, as ``pq-export plugin build`` compiles them."""
    target.mkdir()
    for name in SOURCES:
        if (SOURCE_DIRECTORY / name).is_dir():
            shutil.copytree(
                SOURCE_DIRECTORY / name, target / name, ignore=shutil.ignore_patterns("build", "__pycache__", "*.py")
            )
    for name in SOURCE_FILES:
        if (SOURCE_DIRECTORY / name).is_file():
            shutil.copy2(SOURCE_DIRECTORY / name, target / name)


def write_text_files(directory: Path, stages: Stages) -> None:
    """``deploy/tokenizer_checks.json``, and ``chat.json`` where the tokenizer has a template of fixed pieces."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    checks = [{"text": t, "ids": tokenizer(t, add_special_tokens=False)["input_ids"]} for t in CHECKED_TEXTS]
    _write_json(directory / "deploy" / "tokenizer_checks.json", checks)
    if getattr(tokenizer, "chat_template", None):
        try:
            _write_json(directory / "deploy" / "chat.json", chat_pieces(tokenizer))
        except PqExportError as error:
            stages.progress.warn(f"no deploy/chat.json: {error.what}. The runner takes raw prompts only")


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _add_library(deploy: Path, options: TargetOptions) -> str | None:
    """``libpq.so`` from the cache; a Jetson's only where this machine is one, too."""
    if is_jetson(options) != (platform.machine() == "aarch64"):
        return None
    try:
        found = find_library(*options.sms, plugin=True)
    except PqExportError:
        return None
    shutil.copy2(found, deploy / "libpq.so")
    return "deploy/libpq.so"


def _script(
    config: dict[str, Any], options: TargetOptions, profiles: list[Profile], level: Level, plugin: bool, needed: int
) -> str:
    """``needed``: bytes of memory that an engine build takes, by what TensorRT for RTX's takes."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    return environment.get_template("build_engine.sh.j2").render(
        name=config["source"]["name"],
        precision=config["precision"],
        gpus=f"SM {_gpus(options)}" + (f" (JetPack {options.jetpack})" if options.jetpack else ""),
        level=level.name,
        plugin=plugin,
        jetson=is_jetson(options),
        architectures=";".join(ARCHITECTURES[sm] for sm in options.sms),
        needed_kb=needed // 1024,
        profiles=[
            {kind: _shapes(profile, index) for index, kind in enumerate(("min", "opt", "max"))} for profile in profiles
        ],
    )


def _shapes(profile: Profile, index: int) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shapes[index]))}" for name, shapes in profile.shapes.items())


def _gpus(options: TargetOptions) -> str:
    return ", ".join(map(str, options.sms))
