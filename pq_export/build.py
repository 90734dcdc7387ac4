"""``build``: a ``Calibration`` in, a bundle out. Needs no checkpoint."""

from __future__ import annotations

from pathlib import Path

from pq_export.bundle import Bundle, open_bundle, write_bundle
from pq_export.calibration import Calibration
from pq_export.errors import PqExportError
from pq_export.export.fp_graph import export_fp_graph
from pq_export.files import new_directory
from pq_export.rewrite.lint import lint
from pq_export.rewrite.pipeline import quantized_model
from pq_export.stages import Stages
from pq_export.targets.base import Target, TargetOptions
from pq_export.targets.lint import refuse_findings
from pq_export.targets.profile import find_profile


def build(
    calibration: Calibration,
    calibration_directory: Path,
    target: Target,
    output: Path,
    stages: Stages,
    *,
    form: str | None = None,
    external_data: bool | None = None,
    options: TargetOptions | None = None,
) -> Bundle:
    """Export, rewrite, lint and write the bundle for ``target`` to ``output``, which appears whole."""
    has_bias = any(name.endswith("_proj.bias") for name in calibration.tensors)
    context = calibration.decoder.max_position_embeddings - len(calibration.prefix.token_ids)
    target.refuse_online_rotation(calibration.rotation.online)
    resolved = target.resolved(options or TargetOptions(), context)
    if target.wants_samples and resolved.samples is None:
        raise ValueError(f"target {target.name} needs TargetOptions.samples")
    chosen, reason = target.form_for(calibration.precision, has_bias, form, resolved)
    with stages.stage("export graph"):
        fp = export_fp_graph(calibration.decoder)
    with stages.stage("rewrite graph"):
        model = quantized_model(fp, calibration, chosen, stages.progress.note, cache=target.cache)
        if findings := lint(model):
            raise PqExportError(
                f"the graph is not static: {findings[0]} ({len(findings)} findings): this is a defect, please report it"
            )
        model = target.lower(model, resolved)
        profile = find_profile(target.name)
        if not profile.shapes.static:  # the others look at the graphs that they make of this one
            refuse_findings({"model": model}, profile.for_soc(), len(calibration.prefix.token_ids))
    with stages.stage("write bundle"), new_directory(output) as directory:
        write_bundle(
            directory,
            model,
            calibration,
            calibration_directory,
            target=target.name,
            form=chosen.value,
            form_reason=reason,
            external_data=external_data,
            finish=lambda config: target.finish(directory, config, resolved, stages),
        )
    return open_bundle(output, verify_hashes=False)
