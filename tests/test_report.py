"""The report: complete and minimal dicts, hostile strings, reproducibility, no network."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from pq_export.report import plots
from pq_export.report.html import render

LAYERS, LENGTH = 6, 96
SITES = ("self_attn.qkv_input", "self_attn.o_input", "mlp.gate_up_input", "mlp.down_input")
HOSTILE = '<script>alert("x")</script>&amp;\'$\\frac{1}{$\n\x00\x1b\u202e\u200f\ud800"><img src=http://evil.example/x>'


def outliers(
    rng: np.random.Generator, layers: int, length: int, at: dict[int, tuple[int, str, float]]
) -> dict[str, Any]:
    """Statistics with outliers ``at`` position -> (id, text, ratio)."""
    ratio = np.exp(rng.normal(0, 0.35, length))
    ids, tokens = rng.integers(100, 40000, length).tolist(), [f" w{i}" for i in range(length)]
    for position, (token, text, value) in at.items():
        ratio[position], ids[position], tokens[position] = value, token, text
    peak = np.exp(rng.normal(1.5, 0.3, layers))
    count = np.zeros(layers)
    if at:
        peak[2 : layers - 1] *= 80
        count[2 : layers - 1] = len(at)
    inner = {token: text for position, (token, text, _) in at.items() if position}
    return {
        "mean_count": count.tolist(),
        "max_ratio": peak.tolist(),
        "max_value": (peak * 0.7).tolist(),
        "token_counts": [[token, 900 - 13 * i] for i, token in enumerate(inner)],
        "tokens": list(inner.values()),
        "example": {"layer": 2, "ratio": ratio.tolist(), "token_ids": ids, "tokens": tokens},
    }


def full_report(layers: int = LAYERS, length: int = LENGTH, token: str = "\n") -> dict[str, Any]:
    """Every section, with plausible numbers; ``token`` is the text of an outlier token."""
    rng = np.random.default_rng(0)
    names = [f"layers.{i}.{site}" for i in range(layers) for site in (*SITES, "self_attn.key", "self_attn.value")]
    equal = {name: 1.0 if rng.random() < 0.5 else 1.0 - 10.0 ** rng.uniform(-6, -3.5) for name in names}
    linears = ("q_proj", "k_proj", "v_proj", "o_proj")
    clipped = [*(f"self_attn.{n}" for n in linears), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", *SITES]
    at = {0: (1, "<|im_start|>", 1204.5), 9: (216, token, 811.0), 11: (30, ".", 640.0), 13: (216, token, 702.0)}
    return {
        "title": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pq_export": "0.1.0",
        "source": {"name": "SmolLM2", "format": "gguf", "architecture": "LlamaForCausalLM", "sha256": "ab" * 32},
        "target": {"name": "ort", "form": "integer"},
        "precision": "W4A4KV4",
        "plan": {"precision": "W4A4KV4", "prefix": "auto", "rotate": "online", "seed": 0, "num_layers": None},
        "rotation": {"mode": "online", "seed": 0, "offline": ["R1", "R2"], "online": ["R3", "R4"]},
        "prefix": {"token_ids": [260, 216, 1], "tokens": [" the", token, "<|im_start|>"]},
        "outliers_before": outliers(rng, layers, length, at),
        "outliers_after": outliers(rng, layers, length, {}),
        "layers": {
            "error": np.exp(rng.normal(-4, 0.5, layers)).tolist(),
            "clip_factors": [
                {
                    **{name: round(float(rng.uniform(0.5, 1.0)), 3) for name in clipped},
                    "self_attn.key": 0.9,
                    "self_attn.value": 0.85,
                }
                for _ in range(layers)
            ],
            "activation_scales": {name: float(np.exp(rng.normal(-2, 0.5))) for name in names if name.endswith("input")},
            "kv_scales": {
                name: np.exp(rng.normal(-1, 0.4, 3)).tolist() for name in names if name.endswith(("key", "value"))
            },
        },
        "sizes": [
            {"part": "quantized linears", "bytes": 53_084_160, "parameters": 106_168_320, "bytes_per_parameter": 0.5},
            {"part": "embedding", "bytes": 56_623_104, "parameters": 28_311_552, "bytes_per_parameter": 2.0},
            {"part": "prefix keys and values", "bytes": 69_120, "parameters": 0, "bytes_per_parameter": None},
        ],
        "kv_cache": {"bits": 4, "bytes_per_token": 5760, "fp16_bytes_per_token": 23040},
        "validation": {
            "text": "held-out text",
            "blocks": {
                "tokens": 256,
                "sites": {
                    name: {
                        "equal": share,
                        "count": 147456,
                        "different": round((1 - share) * 147456),
                        "max_difference": 0 if share == 1 else 1,
                        "worst_tie_distance": None if share == 1 else 2.4e-6,
                    }
                    for name, share in equal.items()
                },
                "cosine": (1 - 10 ** rng.uniform(-9, -6, layers)).tolist(),
                "min_equal": min(equal.values()),
            },
            "exact": {
                "tokens": 256,
                "sites": dict.fromkeys(names, 1.0),
                "min_equal": 1.0,
                "greedy_equal": 64,
                "greedy_steps": 64,
                "logits_max_error": 3.1e-11,
            },
            "free_running": {
                "tokens": 256,
                "logits_max_error": 4.31,
                "logits_max": 31.2,
                "logits_cosine": 0.99712,
                "top1_agreement": 0.914,
                "greedy_equal": 17,
                "greedy_steps": 64,
            },
            "perplexity": {
                "windows": 2,
                "window": 2048,
                "rows": [
                    {"model": "FP", "perplexity": 19.0172, "ratio": 1.0, "tokens_per_second": 812.4},
                    {"model": "FP + prefix", "perplexity": 19.0311, "ratio": 1.0007, "tokens_per_second": 798.0},
                    {"model": "fake-quant", "perplexity": 23.4519, "ratio": 1.2332, "tokens_per_second": 240.5},
                    {"model": "ONNX", "perplexity": 23.4623, "ratio": 1.2337, "tokens_per_second": 1321.7},
                ],
            },
            "speed": {
                "prompt": 512,
                "context": 512,
                "rows": [
                    {"model": "fp32 ONNX", "prefill": 640.2, "decode": 38.1},
                    {"model": "W4A4KV4", "prefill": 1411.9, "decode": 61.7},
                ],
            },
            "checks": [
                {"name": "integers equal, fp64", "value": 1.0, "threshold": 1.0, "passed": True},
                {"name": "perplexity ratio ONNX / fake-quant", "value": 1.00044, "threshold": 1.01, "passed": True},
            ],
            "passed": True,
        },
        "stages": [
            {"name": "load", "seconds": 12.31, "peak_rss": 1_234_567_890, "reused": False},
            {"name": "find outlier tokens", "seconds": 0.02, "peak_rss": 1_334_567_890, "reused": True},
            {"name": "search scales", "seconds": 184.9, "peak_rss": 2_034_567_890, "reused": False},
        ],
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "notes": ["One calibration crop was shorter than --seq-len."],
    }


class Page(HTMLParser):
    """Tags with attributes, and the text of every element, as a browser sees them."""

    VOID = frozenset(("meta", "br", "img", "link", "input"))

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def page() -> str:
    return render(full_report())


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_full_report_has_every_section_in_order(page: str) -> None:
    assert headings(page) == [
        "Why a prefix",
        "Prefix tokens",
        "Accuracy",
        "Equality of integers",
        "Scales and error per layer",
        "Size",
        "Speed",
        "Time and memory by stage",
        "Plan, versions, hashes",
    ]
    assert Page(page).open == []
    assert page.count("<svg") == 5


def test_numbers_appear(page: str) -> None:
    text = Page(page).text
    for number in (
        "23.462", "1.2337", "53,084,160", "109.8 MB", "5,760", "25.0 %", "1,411.9",
        "2.21", "17 of 64", "64 of 64", "0.914", "3.1e-11", "184.9", "2.03 GB", "ab" * 32, "2.13.0",
        "197.2",
    ):  # fmt: skip
        assert number in text, number
    assert "Validation passed" in text
    assert "4 of 96 tokens exceed 64" in text
    assert "0 of 96 tokens exceed 64" in text


def test_minimal_report_leaves_sections_out() -> None:
    keys = [key for key in full_report() if key != "title"]
    pages = {render({"title": "model"}), render({"title": "model", **dict.fromkeys(keys)})}
    assert len(pages) == 1
    page = pages.pop()
    assert headings(page) == []
    assert "<svg" not in page
    assert "Not validated" in page


@pytest.mark.parametrize("key", [key for key in full_report() if key != "title"])
def test_every_section_can_stand_alone(key: str) -> None:
    assert Page(render({"title": "model", key: full_report(layers=2, length=16)[key]})).open == []


@pytest.mark.parametrize("key", list(full_report()["validation"]))
def test_every_part_of_a_validation_can_stand_alone(key: str) -> None:
    part = full_report(layers=2, length=16)["validation"][key]
    assert Page(render({"title": "model", "validation": {key: part}})).open == []


@pytest.mark.parametrize("key", ["outliers_before", "outliers_after", "layers", "validation"])
def test_sections_that_others_refer_to_can_be_absent(key: str) -> None:
    report = full_report(layers=2, length=16)
    del report[key]
    assert Page(render(report)).open == []


def hostile(value: Any) -> Any:
    """``value`` with :data:`HOSTILE` after every string, and after every key that is not a field of ours."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, list):
        return [hostile(item) for item in value]
    if isinstance(value, dict):
        model_keys = any(key.startswith("layers.") for key in value) or "torch" in value
        return {key + HOSTILE if model_keys else key: hostile(item) for key, item in value.items()}
    return value


def test_hostile_strings_are_escaped_everywhere(page: str) -> None:
    bad = render(hostile(full_report(token="\n")))
    parsed, good = Page(bad), Page(page)
    assert parsed.open == []
    assert {tag for tag, _ in parsed.tags} == {tag for tag, _ in good.tags}
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert not any("evil" in (value or "") for _, attrs in parsed.tags for value in attrs.values())
    assert bad.encode("utf-8")  # a lone surrogate would raise
    assert all(c.isprintable() or c in "\n" for c in bad)
    # What a reader sees is the string itself, with escapes for what cannot be printed.
    assert '<script>alert("x")</script>&amp;\'$\\frac{1}{$\\n\\x00\\x1b\\u202e\\u200f\\ud800"><img' in parsed.text
    svg = "".join(re.findall(r"<svg.*?</svg>", bad, re.DOTALL))
    assert "&lt;script&gt;" in svg
    assert "$\\frac" in svg  # not parsed as mathtext


def test_figures_show_tokens_as_text() -> None:
    svg = plots.token_ratios([("crop", {"ratio": [1.0, 900.0, 1.0], "tokens": ["a", "$x_1$<b>\n漢\u200f", "c"]})])
    assert '"$x_1$&lt;b&gt;\\n漢\\u200f"' in svg
    assert "var(--ink)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(id|href)="[^"]*"', "", svg))


def test_token_text_is_unambiguous() -> None:
    assert plots.token_text("\n") == '"\\n"'
    assert plots.token_text("\\n") == '"\\\\n"'
    assert plots.token_text("x" * 50, 8) == '"xxxxxxx…"'


def test_same_dict_same_bytes(page: str) -> None:
    report = full_report()
    kept = copy.deepcopy(report)
    assert render(report) == page
    assert report == kept


def test_page_needs_no_network_and_no_script(page: str) -> None:
    assert "http" not in page
    assert "@import" not in page
    assert all(link.startswith("#") for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", page))
    assert "script" not in {tag for tag, _ in Page(page).tags}


def test_ids_are_unique_and_references_resolve(page: str) -> None:
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', page)) == set(ids)


def test_values_that_are_missing_or_not_finite() -> None:
    report = full_report(layers=3, length=16)
    report["layers"]["error"] = [math.nan, 0.0, None]
    report["outliers_before"]["max_ratio"] = [math.inf, 0.0, 2.0]
    report["outliers_after"]["example"] = {}
    report["validation"]["perplexity"]["rows"][-1] |= {"perplexity": math.inf, "tokens_per_second": None}
    report["validation"]["blocks"]["sites"]["lm_head"] = {"equal": 0.5}
    del report["validation"]["free_running"]["logits_cosine"]
    text = Page(render(report)).text
    assert "∞" in text
    assert "lm_head" in text


def test_failed_validation_is_said() -> None:
    report = full_report(layers=2, length=16)
    report["validation"] |= {"passed": False}
    report["validation"]["checks"][1]["passed"] = False
    text = Page(render(report)).text
    assert "Validation failed" in text
    assert "FAILED" in text


def test_shares_below_one_never_show_as_one() -> None:
    report = full_report(layers=2, length=16)
    report["validation"]["blocks"]["min_equal"] = 1 - 4.2e-8
    assert "0.999999958" in Page(render(report)).text
