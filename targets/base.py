"""What a target says about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from pq_export.errors import PqExportError
from pq_export.precision import Precision
from pq_export.rewrite.qlinear import Form


@dataclass(frozen=True)
class Target:
    """A place where bundles run.

    ``choose_form(precision, has_bias)`` returns the form that linears are written in by default, and why.
    ``forms`` are those that ``--form`` may ask for. ``lower(model)`` rewrites a finished model in place into what
    the target runs best; ``portable(model)`` takes that back, leaving standard operators.
    """

    name: str
    title: str
    executes: str
    forms: tuple[Form, ...]
    choose_form: Callable[[Precision, bool], tuple[Form, str]]
    lower: Callable[[onnx.ModelProto], None]
    portable: Callable[[onnx.ModelProto], None]

    def form_for(self, precision: Precision, has_bias: bool, asked: str | None) -> tuple[Form, str]:
        """The form to write: the asked one if this target can run it, else the target's own choice."""
        if asked is None:
            return self.choose_form(precision, has_bias)
        if asked not in [form.value for form in self.forms]:
            raise PqExportError(
                f"target {self.name} does not run form '{asked}'",
                cure=f"Use one of {', '.join(form.value for form in self.forms)}.",
            )
        return Form(asked), "asked for with --form"
