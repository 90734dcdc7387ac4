"""What a target says about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import onnx

from pq_export.errors import PqExportError, UsageError
from pq_export.precision import Precision
from pq_export.rewrite.kv_cache import CacheForm
from pq_export.rewrite.qlinear import Form
from pq_export.stages import Stages


@dataclass(frozen=True)
class TargetOptions:
    """What a command line asks of a target; None is the target's own default.

    ``sms``: compute capabilities, 87 for 8.7. ``jetpack``: of the board, such as "6.2". Lengths in tokens:
    ``max_input_len`` of a prompt, ``max_seq_len`` of prompt and answer. ``float_type``: "fp16" or "fp32", of what is
    not quantized. For graphs of fixed shapes: ``socs`` are the chips, ``prefill_len`` tokens are processed at once, and
    ``cache_len`` remembered beside the prefix. ``linears_only``: a target that takes only the linears of a model may
    leave the rest to the host. ``wide_outputs``: 8-bit linears, such as "up_proj", that write 16 bits; None: all.
    ``simulation``: compare what was compiled, in the target's simulator, with onnxruntime.
    ``samples`` [n, S] of token ids, no flag, show such a target the ranges of what calibration gave no scales for.
    """

    sms: tuple[int, ...] = ()
    jetpack: str | None = None
    max_batch_size: int | None = None
    max_input_len: int | None = None
    max_seq_len: int | None = None
    float_type: str | None = None
    socs: tuple[str, ...] = ()
    prefill_len: int | None = None
    cache_len: int | None = None
    linears_only: bool = False
    wide_outputs: tuple[str, ...] | None = None
    simulation: bool = True
    samples: np.ndarray | None = field(default=None, compare=False, repr=False)

    def given(self) -> list[str]:
        """The flags that were used."""
        flags = {
            "--sm": bool(self.sms),
            "--jetpack": self.jetpack is not None,
            "--max-batch-size": self.max_batch_size is not None,
            "--max-input-len": self.max_input_len is not None,
            "--max-seq-len": self.max_seq_len is not None,
            "--float-type": self.float_type is not None,
            "--soc": bool(self.socs),
            "--prefill-len": self.prefill_len is not None,
            "--cache-len": self.cache_len is not None,
            "--linears-only": self.linears_only,
            "--wide-outputs": self.wide_outputs is not None,
            "--no-simulation": not self.simulation,
        }
        return [name for name, used in flags.items() if used]


GPU_FLAGS = ("--sm", "--jetpack", "--max-batch-size", "--max-input-len", "--max-seq-len", "--float-type")
STATIC_FLAGS = ("--soc", "--prefill-len", "--cache-len")


def _no_options(options: TargetOptions, context: int | None) -> TargetOptions:
    refuse_flags(options, ())
    return options


def refuse_flags(options: TargetOptions, taken: tuple[str, ...]) -> None:
    """Refuse a flag that is not among those ``taken``."""
    if strange := [flag for flag in options.given() if flag not in taken]:
        other = "trt" if strange[0] in GPU_FLAGS else "ethos-u" if strange[0] == "--linears-only" else "qnn-htp"
        raise UsageError(f"{strange[0]} is not for this target", cure=f"Leave it out, or use --target {other}.")


def _as_it_is(model: onnx.ModelProto, options: TargetOptions) -> onnx.ModelProto:
    return model


def _nothing_more(directory: Path, config: dict[str, Any], options: TargetOptions, stages: Stages) -> dict[str, Any]:
    return {}


class Simulation(Protocol):
    """A simulator that runs: ``graphs`` as sessions with ``run(names, feeds)``, by name."""

    def graphs(self, names: list[str]) -> Mapping[str, Any]: ...
    def __enter__(self) -> Simulation: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class Target:
    """A place where bundles run.

    ``choose_form(precision, has_bias, options)`` returns the form that linears are written in by default, and why.
    ``forms`` are those that ``--form`` may ask for; ``check_form(form, options)`` refuses one that cannot be built.
    ``cache``: how the graph holds codes of keys and values.
    ``resolve(options, context)`` fills in what was not given and refuses what cannot be; ``context``, tokens that the
    model holds beside its prefix, is None where it is not known yet.
    ``lower(model, options)`` rewrites a finished model (consumed) into what the target runs best.
    ``executable(model)`` (consumed) is the same function in standard operators, which onnxruntime runs.
    ``native``: onnxruntime runs the shipped file as it is. ``portable(model)`` (in place) then splits what it fuses.
    ``finish(directory, config, options, stages)`` adds files to a bundle whose ``config`` is given; what it returns
    goes into ``pq_config.json``.
    ``takes``: flags that ``resolve`` may be given. ``wants_samples``: ``finish`` reads ``options.samples``.
    ``online_rotation``: it can execute Hadamards between linears.
    ``simulate(directory, config, soc)`` opens a simulator of the accelerator with the bundle's graphs of fixed shapes,
    for a ``with`` block; None where there is no simulator. ``open_runtime(directory, threads)`` opens the bundle in the
    target's own runtime on this machine, with the methods of :class:`pq_export.runtime.OrtDecoder`; None where
    onnxruntime is all there is.
    """

    name: str
    title: str
    executes: str
    forms: tuple[Form, ...]
    choose_form: Callable[[Precision, bool, TargetOptions], tuple[Form, str]]
    check_form: Callable[[Form, TargetOptions], None] = lambda form, options: None
    cache: CacheForm = CacheForm.UNSIGNED
    native: bool = True
    resolve: Callable[[TargetOptions, int | None], TargetOptions] = _no_options
    lower: Callable[[onnx.ModelProto, TargetOptions], onnx.ModelProto] = _as_it_is
    executable: Callable[[onnx.ModelProto], onnx.ModelProto] = lambda model: model
    portable: Callable[[onnx.ModelProto], None] = lambda model: None
    finish: Callable[[Path, dict[str, Any], TargetOptions, Stages], dict[str, Any]] = field(default=_nothing_more)
    takes: tuple[str, ...] = GPU_FLAGS
    wants_samples: bool = False
    online_rotation: bool = True
    simulate: Callable[[Path, dict[str, Any], str | None], Simulation] | None = None
    open_runtime: Callable[[Path, int | None], Any] | None = None

    def resolved(self, options: TargetOptions, context: int | None) -> TargetOptions:
        """``resolve``, and no flag that is for other targets."""
        refuse_flags(options, self.takes)
        return self.resolve(options, context)

    def refuse_online_rotation(self, online: Sequence[str]) -> None:
        """Refuse a model with Hadamards ``online`` between its linears where they cannot run."""
        if online and not self.online_rotation:
            raise UsageError(
                f"target {self.name} cannot execute online Hadamards ({', '.join(sorted(online))})",
                cure="Calibrate with --recipe npu (w4a8), --recipe npu-w8a8, or --rotate offline.",
            )

    def form_for(
        self, precision: Precision, has_bias: bool, asked: str | None, options: TargetOptions
    ) -> tuple[Form, str]:
        """The form to write: the asked one if this target can run it, else the target's own choice."""
        if asked is None:
            return self.choose_form(precision, has_bias, options)
        if asked not in [form.value for form in self.forms]:
            raise PqExportError(
                f"target {self.name} does not run form '{asked}'",
                cure=f"Use one of {', '.join(form.value for form in self.forms)}.",
            )
        self.check_form(Form(asked), options)
        return Form(asked), "asked for with --form"
