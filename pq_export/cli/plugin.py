"""``pq-export plugin``: build the kernels' library, and say which ones there are."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pq_export.cli.console import Screen, output_console, print_json, table
from pq_export.errors import UsageError


def run_build(flags: dict[str, Any]) -> bool:
    """``pq-export plugin build``."""
    from pq_export.plugins.build import LIBRARY_NAME, build
    from pq_export.plugins.toolchain import local_sms, parse_sm

    given = ",".join(flags["sms"])
    sms = [parse_sm(text) for text in given.split(",")] if given else [parse_sm(str(sm)) for sm in local_sms()]
    if not sms:
        raise UsageError("no GPU is here to compile for", cure="Name one with --sm, such as --sm 87 for Jetson Orin.")
    with Screen(flags["as_json"], flags["verbose"]) as screen:
        library = build(
            sms,
            tensorrt_include=flags["tensorrt_include"],
            jobs=flags["jobs"],
            output=flags["output"],
            progress=lambda title: screen.start(title, None),
        )
    path = library.path if flags["output"] is None else flags["output"] / LIBRARY_NAME
    notes = _notes(library)
    if flags["as_json"]:
        print_json({**_facts(library), "path": str(path), "notes": notes})
        return True
    console = output_console()
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{path}   {_gpus(library)}, {_plugin(library)}", highlight=False, markup=False, soft_wrap=True)
    if library.tensorrt:
        console.print(
            f"use: trtexec --onnx=MODEL --dynamicPlugins={path}", highlight=False, markup=False, soft_wrap=True
        )
    return True


def run_list(flags: dict[str, Any]) -> bool:
    """``pq-export plugin list``."""
    from pq_export.plugins.build import built, cache_directory

    libraries = built()
    if flags["as_json"]:
        print_json([_facts(library) for library in libraries])
        return True
    console = output_console()
    if not libraries:
        console.print(f"nothing is built in {cache_directory()}", highlight=False, markup=False, soft_wrap=True)
        return True
    rows = [
        [_gpus(library), library.nvcc, library.tensorrt or "-", library.machine, "yes" if library.current else "no"]
        for library in libraries
    ]
    console.print(table("Libraries", ["GPUs", "CUDA", "TensorRT plugin", "processor", "up to date"], rows))
    for library in libraries:
        console.print(f"{library.path}   {_gpus(library)}", highlight=False, markup=False, soft_wrap=True)
    return True


def _facts(library: Any) -> dict[str, Any]:
    return {**asdict(library), "path": str(library.path), "current": library.current}


def _gpus(library: Any) -> str:
    return ", ".join(f"sm_{sm}" for sm in library.sms)


def _plugin(library: Any) -> str:
    return f"with the TensorRT {library.tensorrt} plugin" if library.tensorrt else "without the TensorRT plugin"


def _notes(library: Any) -> list[str]:
    """What a user would otherwise find out on the device."""
    from pq_export.plugins.toolchain import JETSON_ORIN

    notes = []
    if not library.tensorrt:
        notes.append("no NvInfer.h found, so the TensorRT plugin is left out; give --tensorrt-include DIR")
    if JETSON_ORIN in library.sms and (int(library.nvcc.split(".")[0]) >= 13 or library.machine != "aarch64"):
        notes.append(
            f"JetPack 6 on Jetson Orin needs CUDA 12.x and aarch64; this library is CUDA {library.nvcc}, "
            f"{library.machine}: build it on the device"
        )
    return notes
