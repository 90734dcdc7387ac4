"""The ablation of our own recipe: which rows there are, and that they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pq_export.calib.baselines.ablation import ablation
from pq_export.calib.baselines.harness import compare
from pq_export.calib.checkpoint import load_checkpoint
from pq_export.plan import Plan
from pq_export.stages import Stages
from tests.conftest import VOCAB

STEPS = (
    ("key_bits", {}),
    ("clip_search", {}),
    ("gptq", {"refine": 1}),
    ("clip_search", {"weights": False, "kv": False}),
    ("tune_model", {"samples": 4, "steps": 2, "batch": 2}),
)
WINDOWS = torch.randint(3, VOCAB, (2, 48), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def plan(small_plan: Callable[..., Plan]) -> Plan:
    return small_plan("w4a4", steps=STEPS)


def test_rows_add_the_steps_in_order_and_each_alone(plan: Plan) -> None:
    assert [method.name for method in ablation(plan)] == [
        "search",
        "+ rotation",
        "+ prefix",
        "prefix, no rotation",
        "+ key_bits",
        "+ gptq (refine=1)",
        "+ clip_search (weights=False, kv=False)",
        "+ tune_model (samples=4, steps=2, batch=2)",
        "only key_bits",
        "only gptq (refine=1)",
        "only tune_model (samples=4, steps=2, batch=2)",
    ]


def test_rows_differ_by_their_step_alone(tiny_llama_dir: Path, plan: Plan) -> None:
    rows = compare(load_checkpoint(str(tiny_llama_dir)), plan, ablation(plan), WINDOWS, "gptq", Stages())
    by_name = {row.method: row for row in rows}
    assert by_name["search"].online == () and by_name["+ rotation"].online == ("R3", "R4")
    assert by_name["search"].prefix == () and by_name["+ prefix"].prefix
    assert all(row.static for row in rows)
    # Keys need no more bits here: the step changes nothing, and nothing else may differ.
    assert by_name["only key_bits"].perplexity == by_name["+ prefix"].perplexity == by_name["+ key_bits"].perplexity
    assert by_name["only gptq (refine=1)"].perplexity == by_name["+ gptq (refine=1)"].perplexity
    assert by_name["+ prefix"].perplexity != by_name["only gptq (refine=1)"].perplexity
