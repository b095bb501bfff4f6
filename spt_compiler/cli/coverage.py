"""`spt coverage`: what the pass finds, replaces and declines over architectures of transformers, as a table."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from spt_compiler.cli.console import at_least

# One architecture for each way to write attention or a feed-forward block that is known to us.
ARCHITECTURES = (
    *("bert", "roberta", "distilbert", "albert", "electra", "deberta-v2", "mpnet", "mobilebert", "squeezebert", "rembert"),
    *("megatron-bert", "roformer", "modernbert", "xlnet", "xlm", "flaubert", "nystromformer", "fnet"),
    *("gpt2", "gptj", "gpt_neo", "gpt_neox", "gpt_bigcode", "opt", "bloom", "falcon", "mpt", "codegen", "ctrl", "biogpt", "xglm"),
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "starcoder2", "cohere", "olmo"),
    *("olmo2", "stablelm", "granite", "granite_swa", "smollm3", "exaone4", "helium", "ernie4_5", "glm", "persimmon", "moshi"),
    *("nemotron", "apertus", "bitnet", "gpt_oss", "mixtral", "deepseek_v3"),
    *("t5", "umt5", "bart", "mbart", "marian", "pegasus", "blenderbot"),
    *("vit", "beit", "dinov2", "ijepa", "pvt", "segformer", "mobilevit", "poolformer", "vit_mae", "yolos"),
)
# What stands between these lines is written by hand and kept.
REMARKS = ("<!-- remarks: kept when the page is written anew -->", "<!-- end of remarks -->")
_SIZES = {"vocab_size": 192, "image_size": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4}
# Everything selected and no size too small: coverage is about forms, not about what pays.
_EXACT = {"exact": True, "inner": "eager"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--types", metavar="A,B,...", help="architectures of transformers (default: a list of idioms)")
    parser.add_argument("--attention", default="sdpa,eager", help="attention implementations to look at (sdpa,eager)")
    parser.add_argument("--seq", type=at_least(1), default=48, help="length of text inputs (48)")
    parser.add_argument("--no-check", action="store_true", help="count only; do not compare with the eager model")
    parser.add_argument("--out", metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")


def run(args: argparse.Namespace) -> int:
    rows = []
    for name in args.types.split(",") if args.types else ARCHITECTURES:
        for attention in args.attention.split(","):
            row = measure(name, attention, length=args.seq, check=not args.no_check)
            rows.append(row)
            sys.stdout.write((json.dumps(row) if args.json else _line(row)) + "\n")
            sys.stdout.flush()
    if args.out:
        page = Path(args.out)
        page.parent.mkdir(parents=True, exist_ok=True)
        command = f"spt coverage{f' --types {args.types}' if args.types else ''} --out {args.out}"
        page.write_text(markdown(rows, args.seq, not args.no_check, command, _remarks(page)))
    failed = [r for r in rows if "error" in r and not r.get("unsupported")]
    return 1 if failed or any(r.get("agrees") is False for r in rows) else 0


def measure(name: str, attention: str, *, length: int, check: bool) -> dict[str, Any]:
    """One row: the candidate sites of a small random model, and whether the exact graph agrees with eager.

    Args: name: an architecture. attention: "sdpa" or "eager". length: of text inputs. check: compare outputs and gradients.
    Returns: architecture, attention; attention_sites, attention_replaced, ffn_sites, ffn_replaced; skipped (reason -> count);
        masks (what is code); output_error, gradient_error (relative to the largest value) and agrees; or error.
    """
    import torch

    import spt_compiler
    from spt_compiler.cli import models

    row: dict[str, Any] = {"architecture": name, "attention": attention}
    torch.manual_seed(0)
    torch._dynamo.reset()
    try:
        model, config = models.small(name, _SIZES)
        try:
            model.set_attn_implementation(attention)
        except ValueError:
            return {**row, "error": f"has no {attention} implementation", "unsupported": True}
        model.train()
        inputs = _padded(models.dummy_inputs(model, config, batch=2, length=length))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sites = spt_compiler.explain(model, options=_EXACT, **inputs).sites
            for kind in ("attention", "ffn"):
                of_kind = [s for s in sites if s.kind == kind]
                row[f"{kind}_sites"] = len(of_kind)
                row[f"{kind}_replaced"] = sum(s.status == "replaced" for s in of_kind)
            row["skipped"] = dict(Counter(f"{s.kind}: {s.reason}" for s in sites if s.status != "replaced"))
            row["masks"] = sorted({s.mask for s in sites if s.mask})
            if check:
                errors = _disagreement(model, inputs)
                row.update(output_error=errors[0], gradient_error=errors[1], agrees=errors[0] <= 1e-4 and errors[1] <= 1e-3)
    except Exception as error:  # an architecture that this machine cannot build or run is a row of its own
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    return row


def _padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same with padding at the end of all texts but the first."""
    if "attention_mask" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"].clone()
        inputs["attention_mask"][1:, -5:] = 0
    return inputs


def _disagreement(model: Any, inputs: dict[str, Any]) -> tuple[float, float]:
    """Largest relative difference of outputs, and of gradients, between eager and the exact graph."""
    import torch

    def step(call: Any) -> tuple[list[Any], dict[str, Any]]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        outputs = [o for o in _tensors(call(**inputs)) if o.is_floating_point() and o.requires_grad]
        total = sum((o * torch.randn(o.shape, generator=generator)).sum() / o.numel() ** 0.5 for o in outputs)
        total.backward()
        return [o.detach() for o in outputs], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, slopes = step(model)
    torch._dynamo.reset()
    got, own = step(torch.compile(model, backend="spt", options=_EXACT))
    out = max(((a - b).abs().max() / a.abs().max().clamp_min(1e-6)).item() for a, b in zip(expected, got, strict=True))
    if slopes.keys() != own.keys():
        return out, float("inf")
    floor = 1e-3 * max(g.abs().max().item() for g in slopes.values() if g.numel())
    errors = (((slopes[n] - own[n]).abs().max() / max(slopes[n].abs().max().item(), floor)).item() for n in own if own[n].numel())
    return out, max(errors)


def _tensors(output: Any) -> list[Any]:
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    values = list(output.values()) if hasattr(output, "values") else output
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _line(row: dict[str, Any]) -> str:
    head = f"{row['architecture']:14} {row['attention']:6}"
    if "error" in row:
        return f"{head} {row['error']}"
    counts = ", ".join(f"{k} {row[f'{k}_replaced']}/{row[f'{k}_sites']}" for k in ("attention", "ffn"))
    agrees = "" if "agrees" not in row else f"  {row['output_error']:.0e} {row['gradient_error']:.0e}"
    return f"{head} {counts}{agrees}" + "".join(f"\n    {n} x {reason}" for reason, n in row["skipped"].items())


def _remarks(page: Path) -> str:
    """The remarks of a page that is there already."""
    text = page.read_text() if page.exists() else ""
    start, end = map(text.find, REMARKS)
    return text[start + len(REMARKS[0]) : end].strip() if 0 <= start < end else ""


def markdown(rows: list[dict[str, Any]], length: int, checked: bool, command: str, remarks: str) -> str:
    """The table as a document, with the command, date and versions it was measured with, and what was remarked by hand."""
    import torch
    import transformers

    counted = [r for r in rows if "error" not in r]
    sums = {key: sum(r[key] for r in counted) for k in ("attention", "ffn") for key in (f"{k}_sites", f"{k}_replaced")}
    names = {r["architecture"] for r in counted}
    lines = [
        "# Coverage",
        "",
        f"Written by `{command}` on {datetime.date.today()}: torch {torch.__version__}, transformers",
        f"{transformers.__version__}, Python {platform.python_version()}; models of two layers with random weights, batch 2,",
        f"texts of {length} tokens with padding, train mode, no size thresholds. Sites are the",
        "candidates that the pass saw: replaced, or left dense with a reason.",
        "",
        f"{len(names)} architectures in {len(counted)} forms: attention {sums['attention_replaced']} of "
        f"{sums['attention_sites']} candidates replaced, feed-forward {sums['ffn_replaced']} of {sums['ffn_sites']}.",
    ]
    if checked:
        agreeing = sum(r["agrees"] for r in counted)
        lines.append(
            f"Under `exact` the rewritten graph agrees with eager in {agreeing} of {len(counted)} (outputs to 1e-4, every "
            "gradient to 1e-3 of its largest value)."
        )
    reasons: Counter[str] = Counter()
    for r in counted:
        reasons.update(r["skipped"])
    lines += ["", "Why candidates stay dense, over all rows:", "", "| candidates | reason |", "|---|---|"]
    lines += [f"| {n} | {reason} |" for reason, n in reasons.most_common()]
    head = "| architecture | form | attention sites | replaced | FFN sites | replaced | output, gradient error | left dense, why |"
    lines += ["", head]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for r in rows:
        if r.get("unsupported"):
            continue
        if "error" in r:
            lines.append(f"| {r['architecture']} | {r['attention']} | | | | | | {r['error']} |")
            continue
        counts = " | ".join(f"{r[f'{k}_sites']} | {r[f'{k}_replaced']}" for k in ("attention", "ffn"))
        error = f"{r['output_error']:.0e} / {r['gradient_error']:.0e}" if checked else ""
        why = "; ".join(f"{n} x {reason}" for reason, n in r["skipped"].items())
        lines.append(f"| {r['architecture']} | {r['attention']} | {counts} | {error} | {why} |")
    absent = sorted({f"{r['architecture']} ({r['attention']})" for r in rows if r.get("unsupported")})
    if absent:
        lines += ["", f"Without such an implementation in transformers: {', '.join(absent)}."]
    lines += ["", "## Remarks", "", REMARKS[0], *([remarks] if remarks else []), REMARKS[1]]
    return "\n".join(lines) + "\n"
