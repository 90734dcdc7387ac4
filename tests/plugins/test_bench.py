"""The benchmark without a GPU: its tables and picture from a made document, and its refusals."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from pq_export.errors import PqExportError
from pq_export.plugins import bench, bench_tables
from pq_export.plugins.contestants import BASELINES, OURS, traffic
from pq_export.plugins.roofline import plot
from pq_export.plugins.shapes import BENCH_M, LLAMA_3_8B, QUICK_M, QUICK_SHAPES, SHAPES


@pytest.fixture
def document() -> dict[str, Any]:
    rows = []
    for shape in SHAPES[:3]:
        for M in BENCH_M:
            for name in (*BASELINES, *OURS):
                if name == "int8" and M < 17:
                    continue
                us = 100.0 if name == "fp16" else 40.0
                moved = traffic(name, shape, M, False)
                tops, gbps = 2.0 * M * shape.weights / us / 1e6, moved / us / 1e3
                rates = {"us": us, "tops": tops, "gbps": gbps, "of_ceiling": 0.5, "to_fp16": 100.0 / us}
                rows.append({**asdict(shape), "M": M, "method": name, "bytes": moved, **rates})
    norm = {
        "what": "SiLU·mul, Hadamard",
        "linear": "8B down 14336x4096",
        "K": 14336,
        "M": 1,
        "producer": 3.0,
        "separate": 6.0,
        "quantize": 3.0,
    }
    linear = {"model": "8B", "name": "o", "K": 4096, "N": 4096, "M": 1, "layout": "S8"}
    times = {"default": "a", "default_us": 2.0, "best": "b", "best_us": 1.0, "variants": {"a": 2.0, "b": 1.0}}
    return {
        "device": "GPU",
        "torch": "2",
        "seconds": 3.0,
        "ceilings": {"copy_gbps": 3000.0, "fp16_tops": 740.0, "int8_tops": 1480.0},
        "rows": rows,
        "fused": [
            {**norm, "fused": 3.5, "gemm": 50.0, "cost": 0.01},
            {**norm, "fused": None, "gemm": None, "cost": None},
        ],
        "tuning": [{**linear, **times}],
        "absent": {"int8": ["torch._int_mm needs M >= 17"]},
    }


def test_tables(document: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    bench_tables.print_tables(document)
    out = capsys.readouterr().out
    assert "8B qkv 4096x6144" in out and "2.50" in out and "TOP/s" in out and "GB/s" in out
    assert "int8: torch._int_mm needs M >= 17" in out
    assert "+1.0%" in out and "100%" in out
    assert max(map(len, out.splitlines())) <= 120


def test_picture(document: dict[str, Any], tmp_path: Path) -> None:
    plot(document, tmp_path / "roofline.png")
    content = (tmp_path / "roofline.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000


def test_command_writes_json_and_picture(
    document: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "run", lambda **flags: document)
    arguments = ["--quick", "--json", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png")]
    result = CliRunner().invoke(bench.main, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "bench.json").read_text()) == document
    assert (tmp_path / "bench.png").stat().st_size > 20_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    result = CliRunner().invoke(bench.main, ["--quick"])
    assert result.exit_code == 1 and "needs a CUDA device" in result.output


def test_lists_of_m() -> None:
    assert bench._numbers("1,16") == (1, 16)
    for wrong in ("", "0", "1,x", "-1"):
        with pytest.raises(PqExportError, match="no list of positive numbers"):
            bench._numbers(wrong)


def test_traffic_counts_each_byte_once() -> None:
    shape = LLAMA_3_8B[1]
    assert traffic("fp16", shape, 1, False) == 2 * 4096 * 4096 + 2 * 4096 + 2 * 4096
    assert traffic("w4a4", shape, 16, False) == 4096 * 4096 / 2 + 16 * 4096 + 16 * 2 * 4096
    assert traffic("w4a4", shape, 16, True) == 4096 * 4096 / 2 + 16 * 2048 + 16 * 2 * 4096
    assert traffic("int8", shape, 32, False) == 4096 * 4096 + 32 * 4096 + 32 * 4 * 4096


def test_the_table_is_the_one_that_was_promised() -> None:
    sizes = {(shape.K, shape.N) for shape in SHAPES}
    assert sizes >= {(4096, 4096), (4096, 14336), (4096, 28672), (14336, 4096), (8192, 28672), (28672, 8192)}
    assert len(sizes) == len(SHAPES) and set(QUICK_SHAPES) <= set(SHAPES) and set(QUICK_M) <= set(BENCH_M)
