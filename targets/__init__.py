"""Targets: one module each, with what it accepts and how it is built. Nothing here knows calibration."""

from __future__ import annotations

from pq_export.errors import UsageError
from pq_export.targets.base import Target
from pq_export.targets.ethos_u import ETHOS_U
from pq_export.targets.openvino import OPENVINO
from pq_export.targets.ort import ORT
from pq_export.targets.profile import find_profile, profile_names
from pq_export.targets.profiled import STATIC, profile_target
from pq_export.targets.qnn_htp import QNN_HTP
from pq_export.targets.rknn import RKNN
from pq_export.targets.trt import TRT
from pq_export.targets.trt_rtx import TRT_RTX

TARGETS: dict[str, Target] = {
    target.name: target for target in (ORT, TRT, TRT_RTX, QNN_HTP, OPENVINO, ETHOS_U, RKNN, STATIC)
}


def find_target(name: str) -> Target:
    """The target called ``name``, or the generic one for the profile ``name`` if that is a path ending in ``.toml``.

    Raises :class:`UsageError`, which lists the targets.
    """
    if name.endswith(".toml"):
        return profile_target(find_profile(name))
    if name in TARGETS:
        return TARGETS[name]
    if name in profile_names():
        builder = find_profile(name).built_by
        cure = f"Build with --target {builder if builder in TARGETS else STATIC.name}, and check the bundle against it."
        raise UsageError(f"target {name} is a profile only: nothing here compiles for it", cure=cure)
    raise UsageError(f"unknown target '{name}'", cure=f"Targets: {', '.join(TARGETS)}, or your own FILE.toml.")
