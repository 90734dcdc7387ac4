"""Groups of options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from pq_export.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])
PRECISIONS = ("w4a4", "w4a8", "w8a8", "w4a16")


def _stack(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def apply(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


path_type = click.Path(path_type=Path)

device_option = click.option("--device", default="cpu", show_default=True, help="PyTorch device, such as cuda.")

threads_option = click.option("--threads", type=click.IntRange(min=1), help="onnxruntime threads (default: all cores).")

precision_options = _stack(
    *(
        click.option(f"--{name}", is_flag=True, help=f"{name[1]}-bit weights, {name[3:]}-bit activations.")
        for name in PRECISIONS
    ),
    click.option(
        "--kv",
        type=click.Choice(["4", "8", "16"]),
        help="Bits of cached keys and values (default: 4 for w4a4 and w4a8, 8 for w8a8, 16 for w4a16).",
    ),
)

calibration_options = _stack(
    precision_options,
    click.option(
        "--prefix", metavar="auto|none|TEXT", help="Prefix tokens: found from the data (auto), none, or this text."
    ),
    click.option(
        "--rotate",
        type=click.Choice(["online", "offline", "none"]),
        help="Hadamard rotations: folded and online, folded only, or none (default: online; offline for w4a16).",
    ),
    click.option(
        "--calib-data",
        metavar="FILE|wikitext2|pile|c4[,...]",
        help="Calibration text, or several that take turns (default: a built-in corpus, no download).",
    ),
    click.option(
        "--calib-samples",
        type=int,
        metavar="N",
        help="Text crops for ranges and outliers (default: the recipe's; 32 in 'default').",
    ),
    click.option("--seq-len", type=int, metavar="N", help="Tokens a crop (default: the recipe's; 2048 in 'default')."),
    click.option("--seed", type=int, help="Seed of crops and rotations (default 0)."),
    click.option("--num-layers", type=int, metavar="N", help="Use only the first N layers: smoke runs."),
    click.option(
        "--recipe",
        metavar="fast|short|default|best|npu|npu-w8a8|npu-w8a8-tuned|FILE",
        help="Steps to take, and any of these options, as a YAML file (default: default).",
    ),
    device_option,
    click.option("--trust-remote-code", is_flag=True, help="Run Python code from the model's directory."),
)

build_options = _stack(
    click.option(
        "--target",
        default="ort",
        show_default=True,
        metavar="NAME|FILE.toml",
        help="Where the bundle runs: see 'pq-export targets'; or the profile of an NPU of yours (docs/profiles.md).",
    ),
    click.option(
        "--form",
        type=click.Choice(["qdq", "integer", "plugin"]),
        help="How linears are written (default: the target's).",
    ),
    click.option(
        "--external-data/--no-external-data", default=None, help="Weights in a file of their own (default: above 2 GB)."
    ),
)

target_options = _stack(
    click.option(
        "--sm",
        multiple=True,
        metavar="SM",
        help="GPUs that the bundle is for, such as 87 or 86,89 (default: the JetPack's, this machine's, else 87).",
    ),
    click.option("--jetpack", metavar="6.2|7.1|7.2", help="Refuse what the TensorRT of this JetPack does not take."),
    click.option("--max-batch-size", type=click.IntRange(min=1), help="Sequences at once (default 1)."),
    click.option("--max-input-len", type=click.IntRange(min=1), help="Tokens of a prompt (default 1024)."),
    click.option("--max-seq-len", type=click.IntRange(min=2), help="Tokens of prompt and answer (default 4096)."),
    click.option(
        "--float-type", type=click.Choice(["fp16", "fp32"]), help="Type of what is not quantized (default fp16)."
    ),
    click.option("--soc", multiple=True, metavar="SOC", help="NPUs that the bundle is for, such as sm8650,sm8750."),
    click.option(
        "--prefill-len", type=click.IntRange(min=2), help="Tokens of a prompt that an NPU takes at once (64)."
    ),
    click.option("--cache-len", type=click.IntRange(min=1), help="Tokens that an NPU's cache holds (512)."),
    click.option(
        "--wide-outputs",
        metavar="all|none|NAMES",
        help="For qnn-htp: linears of 8 bits that write, and are computed in, 16 bits, such as down_proj (all).",
    ),
    click.option(
        "--simulation/--no-simulation",
        default=True,
        help="For qnn-htp: compare the compiled graphs with onnxruntime, in QNN's simulator (default: yes).",
    ),
    click.option("--linears-only", is_flag=True, help="For ethos-u: the linears alone, with the rest on your host."),
)

run_options = _stack(
    click.option(
        "--on",
        "run_on",
        type=click.Choice(["model", "static", "simulator", "runtime"]),
        help="What runs of a bundle: model.onnx in onnxruntime, an NPU's graphs of fixed shapes there or in the NPU's "
        "simulator, or the target's own runtime (default: simulator, if any, to generate; model to evaluate).",
    ),
    click.option("--soc", metavar="SOC", help="NPU to simulate (default: the bundle's first)."),
)

validation_options = _stack(
    click.option("--text", type=path_type, metavar="FILE", help="Evaluation text (default: held-out built-in text)."),
    click.option("--windows", type=click.IntRange(min=1), default=2, show_default=True, help="Perplexity windows."),
    click.option("--window", type=click.IntRange(min=16), default=2048, show_default=True, help="Tokens a window."),
    threads_option,
    click.option("--speed", is_flag=True, help="Measure prefill and decode tokens/s beside the fp32 ONNX."),
    click.option(
        "--min-code-share",
        type=float,
        default=0.999,
        show_default=True,
        help="Least share of equal integer codes at any quantizer.",
    ),
    click.option(
        "--min-greedy", type=int, default=64, show_default=True, help="Least number of equal greedy tokens, of 64."
    ),
    click.option(
        "--max-ppl-difference",
        type=float,
        default=0.03,
        show_default=True,
        help="Largest relative perplexity difference, ONNX to fake-quant.",
    ),
    click.option("--max-ppl-ratio", type=float, help="Largest perplexity ratio, ONNX to FP (default: not judged)."),
)

common_options = _stack(
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."),
    click.option("-v", "--verbose", is_flag=True, help="Say more."),
)

output_options = _stack(
    click.option("--force", is_flag=True, help="Replace what lies at the output."),
)


def chosen_precision(flags: dict[str, Any]) -> str | None:
    """Take the precision flags out of ``flags``; more than one is a usage error."""
    given = [name for name in PRECISIONS if flags.pop(name)]
    if len(given) > 1:
        raise UsageError(f"--{given[0]} and --{given[1]} exclude each other", cure="Give one precision.")
    return given[0] if given else None
