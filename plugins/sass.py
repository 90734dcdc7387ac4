"""What the compiler made of the kernels: instructions, registers, spills, read from a built library.

``python -m pq_export.plugins.sass libpq.so`` prints it. CUDA's cuobjdump and nvdisasm do the reading; both are also
packages (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm). Dynamic shared memory is chosen at launch and is not seen.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from pq_export.errors import PqExportError
from pq_export.plugins.toolchain import toolkit_directories

# What multiplies matrices: mma.sync, wgmma and tcgen05 in integers, and what floats would show.
TENSOR_CORE = re.compile(r"U?(IMMA|IGMMA|BMMA|HMMA|HGMMA|QMMA|QGMMA|OMMA|TC[A-Z]+MMA)\b")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
USAGE = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")
SYMBOL = re.compile(r"\s+0x[0-9a-f]+\s.*\sFUNC\s.*\s(0x[0-9a-f]+)\s+(\S+)$")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one GPU.

    ``instructions``: full mnemonics and how often each stands in the code. ``functions``: what it may call: the rare
    cases of divisions and roots, and instructions that the GPU lacks and the compiler emulates.
    """

    name: str
    arch: str
    instructions: Counter[str]
    functions: frozenset[str]
    registers: int
    stack: int
    shared: int
    local: int

    def count(self, pattern: str) -> int:
        """Instructions whose mnemonic starts with what the regular expression ``pattern`` matches."""
        return sum(count for name, count in self.instructions.items() if re.match(pattern, name))

    @property
    def emulated(self) -> frozenset[str]:
        """Functions that stand for an instruction."""
        return frozenset(name for name in self.functions if not name.endswith("_slowpath"))

    @property
    def spills(self) -> int:
        """Accesses to local memory: spilled registers, or arrays that are indexed at run time."""
        return self.count(r"(LDL|STL)\b")

    @property
    def tensor_core(self) -> dict[str, int]:
        return {name: count for name, count in sorted(self.instructions.items()) if TENSOR_CORE.match(name)}


def kernels(library: Path) -> list[Kernel]:
    """Every kernel in ``library``, for every GPU that it holds code for."""
    if not library.is_file():
        raise PqExportError("does not exist", where=library, cure="Build it with: pq-export plugin build")
    instructions = dict(_instructions(_cuobjdump("-sass", library)))
    usage = dict(_usage(_cuobjdump("-res-usage", library)))
    functions = _functions(_cuobjdump("-elf", library))
    mangled = sorted({name for _, name in usage})
    names = dict(zip(mangled, _demangled(mangled), strict=True))
    return [
        Kernel(
            names[name],
            arch,
            instructions.get((arch, name), Counter()),
            functions.get((arch, name), frozenset()),
            registers=found["REG"],
            stack=found["STACK"],
            shared=found["SHARED"],
            local=found["LOCAL"],
        )
        for (arch, name), found in usage.items()
    ]


Key = tuple[str, str]  # architecture, mangled name


def _instructions(text: str) -> Iterator[tuple[Key, Counter[str]]]:
    arch, counts = "", Counter[str]()
    for line in text.splitlines():
        if match := INSTRUCTION.match(line):
            counts[match.group(1)] += 1
        elif match := re.match(r"\s*code for (\w+)", line):
            arch = match.group(1)
        elif match := re.match(r"\s*Function : (\S+)", line):
            counts = Counter[str]()
            yield (arch, match.group(1)), counts


def _usage(text: str) -> Iterator[tuple[Key, dict[str, int]]]:
    arch = name = ""
    for line in text.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            arch = match.group(1)
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match.group(1)
        elif found := dict(USAGE.findall(line)):
            yield (arch, name), {key: int(value) for key, value in found.items()}


def _functions(text: str) -> dict[Key, frozenset[str]]:
    """By the symbol tables: a function that a kernel calls lies in the kernel's own section."""
    found: dict[Key, frozenset[str]] = {}
    arch, kernels_in, called_in = "", dict[str, str](), dict[str, set[str]]()
    for line in [*text.splitlines(), "arch = end"]:
        if match := re.match(r"\s*arch = (\w+)", line):  # the next file inside the library
            found.update({(arch, name): frozenset(called_in.get(at, ())) for at, name in kernels_in.items()})
            arch, kernels_in, called_in = match.group(1), {}, {}
        elif match := SYMBOL.match(line):
            section, name = match.groups()
            if name.startswith("$"):
                called_in.setdefault(section, set()).add(name.split("$")[-1])
            else:
                kernels_in[section] = name
    return found


def _demangled(names: list[str]) -> list[str]:
    """By c++filt, which comes with the host compiler; without it as they are. Arguments are left out."""
    if not names or not (tool := shutil.which("c++filt")):
        return names
    done = subprocess.run([tool, "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    noise = re.compile(r"_GLOBAL__N__\w+::|\(anonymous namespace\)::|\bpq::|^void ")
    return [noise.sub("", line).replace("> >", ">>") for line in done.stdout.splitlines()]


def find_tools() -> list[Path] | None:
    """Directories with cuobjdump and nvdisasm: PATH, the CUDA toolkit, or PyPI's packages. None without them."""
    spec = importlib.util.find_spec("nvidia")
    roots = (spec and spec.submodule_search_locations) or []
    packages = [directory for root in roots for directory in Path(root).glob("*/bin")]
    places = [*map(Path, os.environ.get("PATH", "").split(os.pathsep)), *toolkit_directories(), *packages]
    found = [next((p for p in places if shutil.which(str(p / tool))), None) for tool in ("cuobjdump", "nvdisasm")]
    return [place for place in found if place is not None] if all(found) else None


def _cuobjdump(option: str, library: Path) -> str:
    places = find_tools()
    if places is None:
        raise PqExportError(
            "cuobjdump and nvdisasm are not here",
            cure="Install CUDA's, or: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
        )
    path = os.pathsep.join([*map(str, places), os.environ.get("PATH", "")])  # cuobjdump runs nvdisasm
    command = [str(places[0] / "cuobjdump"), option, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": path})
    if done.returncode:
        raise PqExportError(f"cuobjdump failed: {done.stderr.strip()[:300]}", where=library)
    return done.stdout


@click.command()
@click.argument("library", type=click.Path(path_type=Path))
def main(library: Path) -> None:
    """Print LIBRARY's kernels: registers, shared memory, spills, tensor-core instructions."""
    from pq_export.cli.console import output_console, table

    try:
        found = kernels(library)
    except PqExportError as error:
        raise click.ClickException(str(error)) from None
    columns = ["kernel", "registers", "shared", "spills", "instructions", "tensor core"]
    for arch in sorted({kernel.arch for kernel in found}):
        rows = [
            [
                kernel.name,
                *(str(n) for n in (kernel.registers, kernel.shared, kernel.spills, kernel.instructions.total())),
                ", ".join(f"{count} {name}" for name, count in kernel.tensor_core.items())
                + (" (emulation)" if kernel.emulated else ""),
            ]
            for kernel in sorted(found, key=lambda kernel: kernel.name)
            if kernel.arch == arch
        ]
        output_console().print(table(arch, columns, rows))


if __name__ == "__main__":
    main()
