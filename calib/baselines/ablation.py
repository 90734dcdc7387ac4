"""Ablation of our own method: each step added in order, and each step alone on what all of them stand on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pq_export.calib.baselines.harness import Arena, Candidate, Method
from pq_export.calib.steps import STEPS, Phase
from pq_export.plan import Plan
from pq_export.stages import Stages

Steps = tuple[tuple[str, dict[str, Any]], ...]
PAPER = "2410.05265"


def ablation(plan: Plan) -> list[Method]:
    """Methods: floating point, then rotation, prefix and the plan's steps one after the other, then each alone.

    'alone' is beside rotation, prefix and a scale search, without which nothing here works.
    """
    first = next(index for index, step in enumerate(plan.steps) if step[0] == "clip_search")
    search, others = plan.steps[first], [index for index in range(len(plan.steps)) if index != first]
    rows = [
        _method("search", "scale search alone", plan, (search,), rotate="none", prefix="none"),
        _method("+ rotation", f"and rotations ({plan.rotate})", plan, (search,), prefix="none"),
        _method("+ prefix", "and the prefix", plan, (search,)),
        _method("prefix, no rotation", "prefix without rotations", plan, (search,), rotate="none"),
    ]
    for index in others:
        taken = sorted({first, *(i for i in others if i <= index)})
        steps = tuple(plan.steps[i] for i in taken)
        rows.append(_method(f"+ {_text(plan.steps[index])}", "and this step", plan, steps))
    for name, step in {plan.steps[i][0]: plan.steps[i] for i in others}.items():
        alone = (step, search) if STEPS[name].phase < Phase.BLOCKS else (search, step)
        if name != "clip_search":
            rows.append(_method(f"only {_text(step)}", "this step alone", plan, alone))
    return rows


def _text(step: tuple[str, dict[str, Any]]) -> str:
    name, options = step
    return name + (f" ({', '.join(f'{k}={v}' for k, v in options.items())})" if options else "")


def _method(name: str, title: str, plan: Plan, steps: Steps, **changes: Any) -> Method:
    changed = replace(plan, steps=steps, **changes)

    def run(arena: Arena, stages: Stages) -> Candidate:
        return arena.with_plan(changed).recipe(stages, steps)

    return Method(name, title, PAPER, True, run)
