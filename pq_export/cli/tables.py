"""Reports as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from pq_export.cli.console import bytes_text, seconds_text, table


def print_report(console: Console, report: dict[str, Any]) -> None:
    """Prefix, sizes, accuracy, checks and stages of one export."""
    prefix = " ".join(repr(token) for token in report["prefix"]["tokens"]) or "none"
    console.print(
        f"[bold]{escape(report['title'])}[/bold]  {report['precision']}  target {report['target']['name']} "
        f"({report['target']['form']}: {escape(report['target']['reason'])})",
        highlight=False,
    )
    console.print(f"prefix: {escape(prefix)}  ids {report['prefix']['token_ids']}", highlight=False)
    before, after = report.get("outliers_before"), report.get("outliers_after")
    if before and after:
        worst = max(range(len(before["max_ratio"])), key=before["max_ratio"].__getitem__)
        console.print(
            f"outliers at down_proj's input, layer {worst}: max {before['max_value'][worst]:.0f} -> "
            f"{after['max_value'][worst]:.1f}, max/median {before['max_ratio'][worst]:.0f} -> "
            f"{after['max_ratio'][worst]:.1f} (all layers: {max(before['max_ratio']):.0f} -> "
            f"{max(after['max_ratio']):.1f}; outlier above 64)",
            highlight=False,
        )
    _print_sizes(console, report)
    if report.get("validation"):
        print_validation(console, report["validation"])
    stages = report["stages"]
    device = any(s.get("peak_device") for s in stages)
    rows = [
        [
            s["name"] + (" (kept)" if s["reused"] else ""),
            seconds_text(s["seconds"]),
            bytes_text(s["peak_rss"]),
            *([bytes_text(s.get("peak_device", 0))] if device else []),
        ]
        for s in stages
    ]
    if rows:
        columns = ["stage", "time", "peak RSS", *(["peak CUDA"] if device else [])]
        peaks = [bytes_text(max(s.get(key, 0) for s in stages)) for key in ("peak_rss", "peak_device")[: 1 + device]]
        rows.append(["total", seconds_text(sum(s["seconds"] for s in stages)), *peaks])
        console.print(table("Time and memory", columns, rows))


def _print_sizes(console: Console, report: dict[str, Any]) -> None:
    rows = [
        [p["part"], bytes_text(p["bytes"]), f"{p['bytes_per_parameter']:.4f}" if "bytes_per_parameter" in p else ""]
        for p in report["sizes"]
    ]
    console.print(table("Weights in the file", ["part", "size", "bytes/parameter"], rows))
    kv = report["kv_cache"]
    console.print(
        f"KV cache: {kv['bits']} bits in {kv['container']}, {kv['bytes_per_token']:,} bytes a token "
        f"(FP16: {kv['fp16_bytes_per_token']:,})",
        highlight=False,
    )


def print_validation(console: Console, validation: dict[str, Any]) -> None:
    """Perplexity, speed and checks."""
    perplexity = validation["perplexity"]
    rows = [
        [
            r["model"],
            f"{r['perplexity']:.4f}",
            "" if r["ratio"] is None else f"{r['ratio']:.4f}",
            f"{r['kl']:.4f}" if "kl" in r else "",
            f"{r['top1']:.1%}" if "top1" in r else "",
            f"{r['tokens_per_second']:.0f}",
        ]
        for r in perplexity["rows"]
    ]
    console.print(
        table(
            f"Perplexity, {perplexity['windows']} windows of {perplexity['window']}, {validation['text']}",
            ["model", "perplexity", "ratio to FP", "KL to FP", "top-1 equal", "tokens/s"],
            rows,
        )
    )
    free = validation["free_running"]
    console.print(
        f"free running in fp32: logits cosine {free['logits_cosine']:.6f}, top-1 equal "
        f"{free['top1_agreement']:.1%} of {free['tokens']} tokens, greedy {free['greedy_equal']} of "
        f"{free['greedy_steps']} tokens equal",
        highlight=False,
    )
    ties = {s: c for s, c in validation["blocks"]["sites"].items() if c["different"]}
    for site, c in sorted(ties.items(), key=lambda item: item[1]["equal"])[:8]:
        console.print(
            f"rounding ties: {site}: {c['different']} of {c['count']} codes differ, by {c['max_difference']}; "
            f"at most {c['worst_tie_distance']:.1e} steps from the boundary",
            highlight=False,
        )
    if validation.get("speed"):
        speed = validation["speed"]
        rows = [
            [r["model"], f"{r['decode']:.1f}", f"{r['prefill']:.0f}", f"{r['prefill_all_logits']:.0f}"]
            for r in speed["rows"]
        ]
        console.print(
            table(
                f"Speed in tokens/s, prompt {speed['prompt']}",
                ["model", "decode", "prefill", "prefill, all logits"],
                rows,
            )
        )
    rows = [
        [
            c["name"],
            f"{c['value']:.6g}",
            f"{'≥' if c['at_least'] else '≤'} {c['threshold']:g}",
            "pass" if c["passed"] else "FAIL",
        ]
        for c in validation["checks"]
    ]
    console.print(table("Checks", ["check", "value", "limit", ""], rows))
