"""Commands of ``pq-export``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

from pq_export import __version__
from pq_export.cli import options as opt
from pq_export.errors import EXIT_BELOW_THRESHOLD


class GpuListCommand(click.Command):
    """``--sm 86 89 120`` is ``--sm 86,89,120``; a model called 120 can be written ./120."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        joined: list[str] = []
        for arg in args:
            if len(joined) > 1 and joined[-2] == "--sm" and re.fullmatch(r"\d{2,3}", arg) and joined[-1][-1:].isdigit():
                joined[-1] += f",{arg}"
            else:
                joined.append(arg)
        return super().parse_args(ctx, joined)


class DefaultCommandGroup(click.Group):
    """``pq-export MODEL …`` is ``pq-export export MODEL …``."""

    command_class = GpuListCommand

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            args = ["export", *args]
        return super().parse_args(ctx, args)


@click.group(cls=DefaultCommandGroup, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(__version__, prog_name="pq-export")
def cli() -> None:
    """Static quantization of LLMs with PrefixQuant: from a checkpoint to an ONNX bundle.

    \b
      pq-export MODEL --target ort --w4a4 -o OUT    calibrate + build + validate
    MODEL is a Hugging Face directory, a hub id, or a .gguf file.
    """


@cli.command()
@click.argument("model")
@opt.build_options
@opt.target_options
@click.option(
    "-o", "--output", type=opt.path_type, required=False, help="Bundle to write (default: out/NAME-PRECISION)."
)
@opt.calibration_options
@opt.validation_options
@click.option("--dry-run", is_flag=True, help="Print the resolved plan with expected size and time, and stop.")
@opt.output_options
@opt.common_options
def export(model: str, **flags: Any) -> None:
    """Calibrate, build and validate: MODEL in, a bundle and its report out.

    The calibration is kept in OUT.calib and used again when nothing it depends on changed.
    """
    from pq_export.cli.commands import run_export

    _exit(run_export(model, flags))


@cli.command()
@click.argument("model")
@click.option("-o", "--output", type=opt.path_type, required=True, help="Calibration directory to write.")
@opt.calibration_options
@click.option("--dry-run", is_flag=True, help="Print the resolved plan with expected size and time, and stop.")
@opt.output_options
@opt.common_options
def calibrate(model: str, **flags: Any) -> None:
    """Find prefix and scales of MODEL (PyTorch) and write a calibration."""
    from pq_export.cli.commands import run_calibrate

    _exit(run_calibrate(model, flags))


@cli.command()
@click.argument("calibration", type=opt.path_type)
@opt.build_options
@opt.target_options
@click.option("-o", "--output", type=opt.path_type, required=True, help="Bundle to write.")
@opt.output_options
@opt.common_options
def build(calibration: Path, **flags: Any) -> None:
    """Turn a calibration into a bundle for a target. Needs no checkpoint."""
    from pq_export.cli.commands import run_build

    _exit(run_build(calibration, flags))


@cli.command()
@click.argument("bundle", type=opt.path_type)
@click.option("--calib", type=opt.path_type, help="The calibration it was built from (default: BUNDLE.calib).")
@click.option("--model", help="The checkpoint, for the floating-point rows.")
@opt.validation_options
@opt.device_option
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the model's directory.")
@opt.common_options
def validate(bundle: Path, **flags: Any) -> None:
    """Compare a bundle with what calibration simulated. Exit code 3: below a threshold."""
    from pq_export.cli.commands import run_validate

    _exit(run_validate(bundle, flags))


@cli.command()
@click.argument("model")
@opt.calibration_options
@click.option(
    "--methods",
    metavar="NAME,NAME,...",
    help="Which to run: fp, fp+prefix, rtn, smoothquant, outliertune, static, quarot, quarot+clip, qfep, cushioncache, "
    "prefix+dynamic, prefixquant-rtn, prefixquant (default: all).",
)
@click.option(
    "--rounding",
    type=click.Choice(["gptq", "rtn"]),
    default="gptq",
    show_default=True,
    help="How every method rounds weights that does not name its own: GPTQ, or to nearest after a clip search.",
)
@click.option("--text", type=opt.path_type, metavar="FILE", help="Evaluation text (default: held-out built-in text).")
@click.option("--windows", type=click.IntRange(min=1), default=2, show_default=True, help="Windows to evaluate.")
@click.option("--window", type=click.IntRange(min=16), default=2048, show_default=True, help="Tokens a window.")
@click.option("--ablation", is_flag=True, help="Our recipe's steps, added in order and each alone, instead of rivals.")
@click.option(
    "-o", "--output", type=opt.path_type, help="Directory for compare.json and .html (default: out/NAME-...-compare)."
)
@opt.output_options
@opt.common_options
def compare(model: str, **flags: Any) -> None:
    """Run rival methods and ours on MODEL and print one table. Nothing of it can be exported.

    Every method sees the same calibration text, weight rounding and evaluation text.
    """
    from pq_export.cli.compare import run_compare

    _exit(run_compare(model, flags))


@cli.command()
@click.argument("bundle", type=opt.path_type)
@click.option("-p", "--prompt", required=True, help="The prompt.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0.0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(min=0.0, max=1.0, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@opt.device_option
@opt.threads_option
@opt.run_options
@click.option("--chat/--raw", default=None, help="Wrap the prompt in the chat template (default: if there is one).")
@opt.common_options
def generate(bundle: Path, **flags: Any) -> None:
    """Generate text with a bundle, token by token.

    In onnxruntime, in the simulator of the NPU that it is for, or with --device cuda in PyTorch with the CUDA kernels
    ('pq-export plugin build').
    """
    from pq_export.cli.commands import run_generate

    _exit(run_generate(bundle, flags))


@cli.command()
@click.argument("what", metavar="MODEL|CALIB|OUT")
@click.option("--tasks", metavar="A,B,...", help="lm-eval tasks, groups or patterns (needs pq-export[eval]).")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N documents of each task.")
@click.option("--num-fewshot", type=click.IntRange(min=0), metavar="N", help="Examples shown (default: the task's).")
@click.option("--include-path", type=opt.path_type, metavar="DIR", help="Your own task YAML files; their code runs.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Most sequences at once.")
@click.option("--text", type=opt.path_type, metavar="FILE", help="Text to measure perplexity on.")
@click.option("--windows", type=click.IntRange(min=1), default=20, show_default=True, help="Windows of the text.")
@click.option("--window", type=click.IntRange(min=16), default=2048, show_default=True, help="Tokens a window.")
@click.option("--model", help="The checkpoint, for KL divergence and top-1 agreement on the text.")
@opt.device_option
@opt.threads_option
@opt.run_options
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the model's directory.")
@opt.common_options
def evaluate(what: str, **flags: Any) -> None:
    """Score a checkpoint, a calibration or a bundle on tasks and on a text.

    The prefix is in place as it is when the model is used. A bundle runs in onnxruntime.
    """
    from pq_export.cli.evaluate import run_evaluate

    _exit(run_evaluate(what, flags))


@cli.command()
@click.argument("what", metavar="MODEL|CALIB|OUT")
@opt.common_options
def inspect(what: str, **flags: Any) -> None:
    """Say what a checkpoint, a calibration or a bundle is."""
    from pq_export.cli.commands import run_inspect

    _exit(run_inspect(what, flags))


@cli.command()
@click.argument("bundle", type=opt.path_type, metavar="BUNDLE|FILE.onnx")
@click.option("--target", required=True, metavar="NAME|FILE.toml", help="Whose profile: see 'pq-export targets'.")
@click.option("--soc", help="Chip of that target (default: the profile's).")
@opt.common_options
def check(bundle: Path, **flags: Any) -> None:
    """Compare a bundle's graphs with what a target takes, without compiling anything.

    Each finding names node, layer, rule and cure. Exit codes: 0 nothing found, 1 findings or an unreadable bundle,
    2 usage or a mistake in a profile file.
    """
    from pq_export.cli.check import run_check

    sys.exit(run_check(bundle, flags))


@cli.command()
@click.argument("name", required=False, metavar="[NAME|FILE.toml]")
@opt.common_options
def targets(name: str | None, **flags: Any) -> None:
    """List the targets, or show the profile of one: what it takes."""
    from pq_export.cli.check import run_profile, run_targets

    _exit(run_targets(flags) if name is None else run_profile(name, flags))


@cli.group()
def plugin() -> None:
    """Build the CUDA kernels and their TensorRT plugin, libpq.so."""


@plugin.command("build", cls=GpuListCommand)
@click.option(
    "--sm",
    "sms",
    multiple=True,
    metavar="SM",
    help="GPU to compile for: 80, 86, 87 (Jetson Orin), 89, 90, 100, 110 (Thor) or 120; several (87,110) give one "
    "library for all of them (default: this machine's).",
)
@click.option("-o", "--output", type=opt.path_type, metavar="DIR", help="Also copy libpq.so into DIR.")
@click.option(
    "--tensorrt-include",
    type=opt.path_type,
    metavar="DIR",
    help="TensorRT's headers (default: $TENSORRT_INCLUDE, then the system's).",
)
@click.option("-j", "--jobs", type=click.IntRange(min=1), metavar="N", help="Compilers at a time (default: all cores).")
@opt.common_options
def build_plugin(**flags: Any) -> None:
    """Compile libpq.so for one GPU or several.

    \b
      pq-export plugin build --sm 87
      trtexec --onnx=model.onnx --dynamicPlugins=PATH/libpq.so

    Needs nvcc and CMake. The TensorRT plugin is inside where TensorRT's headers are found. The library is kept in the
    user's cache and used again until its sources or the compiler change.
    """
    from pq_export.cli.plugin import run_build

    _exit(run_build(flags))


@plugin.command("list")
@opt.common_options
def list_plugins(**flags: Any) -> None:
    """List the libraries that were built."""
    from pq_export.cli.plugin import run_list

    _exit(run_list(flags))


def _exit(passed: bool) -> None:
    if not passed:
        sys.exit(EXIT_BELOW_THRESHOLD)
