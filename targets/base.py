"""What a target says about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    not quantized.
    """

    sms: tuple[int, ...] = ()
    jetpack: str | None = None
    max_batch_size: int | None = None
    max_input_len: int | None = None
    max_seq_len: int | None = None
    float_type: str | None = None

    def given(self) -> list[str]:
        """The flags that were used."""
        flags = {
            "--sm": bool(self.sms),
            "--jetpack": self.jetpack is not None,
            "--max-batch-size": self.max_batch_size is not None,
            "--max-input-len": self.max_input_len is not None,
            "--max-seq-len": self.max_seq_len is not None,
            "--float-type": self.float_type is not None,
        }
        return [name for name, used in flags.items() if used]


def _no_options(options: TargetOptions, context: int | None) -> TargetOptions:
    if given := options.given():
        raise UsageError(f"{given[0]} is not for this target", cure="Leave it out, or use --target trt.")
    return options


def _as_it_is(model: onnx.ModelProto, options: TargetOptions) -> onnx.ModelProto:
    return model


def _nothing_more(directory: Path, config: dict[str, Any], options: TargetOptions, stages: Stages) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Target:
    """A place where bundles run.

    ``choose_form(precision, has_bias, options)`` returns the form that linears are written in by default, and why.
    ``forms`` are those that ``--form`` may ask for. ``cache``: how the graph holds codes of keys and values.
    ``resolve(options, context)`` fills in what was not given and refuses what cannot be; ``context``, tokens that the
    model holds beside its prefix, is None where it is not known yet.
    ``lower(model, options)`` rewrites a finished model (consumed) into what the target runs best.
    ``executable(model)`` (consumed) is the same function in standard operators, which onnxruntime runs.
    ``native``: onnxruntime runs the shipped file as it is. ``portable(model)`` (in place) then splits what it fuses.
    ``finish(directory, config, options, stages)`` adds files to a bundle whose ``config`` is given; what it returns
    goes into ``pq_config.json``.
    """

    name: str
    title: str
    executes: str
    forms: tuple[Form, ...]
    choose_form: Callable[[Precision, bool, TargetOptions], tuple[Form, str]]
    cache: CacheForm = CacheForm.UNSIGNED
    native: bool = True
    resolve: Callable[[TargetOptions, int | None], TargetOptions] = _no_options
    lower: Callable[[onnx.ModelProto, TargetOptions], onnx.ModelProto] = _as_it_is
    executable: Callable[[onnx.ModelProto], onnx.ModelProto] = lambda model: model
    portable: Callable[[onnx.ModelProto], None] = lambda model: None
    finish: Callable[[Path, dict[str, Any], TargetOptions, Stages], dict[str, Any]] = field(default=_nothing_more)

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
        return Form(asked), "asked for with --form"
