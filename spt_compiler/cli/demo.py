"""`spt demo`: trains a small model on English, then fine-tunes it on code, dense and sparse, side by side."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from spt_compiler.cli import compare, training, workers
from spt_compiler.cli.console import Console, at_least, format_seconds
from spt_compiler.cli.doctor import compiler_problem
from spt_compiler.cli.training import Run
from spt_compiler.config import SPTConfig, parse_assignments

# Sizes at which sparsity can pay on a CPU, and that train within the minutes a first try may take.
SIZES = {
    "vocab_size": 256, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 8, "max_position_embeddings": 4096,
}  # fmt: skip
LENGTH, PRETRAIN_STEPS, STEPS = 2048, 40, 30
QUICK_SIZES = {**SIZES, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
QUICK_LENGTH, QUICK_STEPS = 256, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a tiny model and few steps: seconds, no figures to trust")
    parser.add_argument("--out", default="out/demo", metavar="DIR", help="where to write (out/demo)")
    parser.add_argument("--steps", type=at_least(1), help=f"fine-tuning steps ({STEPS})")
    parser.add_argument("--pretrain-steps", type=at_least(1), help=f"dense steps on English before them ({PRETRAIN_STEPS})")
    parser.add_argument("--seq", type=at_least(2), help=f"tokens (bytes) per sequence ({LENGTH})")
    parser.add_argument("--architecture", default="llama", metavar="TYPE", help="causal LM of transformers (llama)")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the backend")
    parser.add_argument("--inner", choices=("inductor", "aot_eager", "eager"), help="compiler of both sides (inductor)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="plain text, whatever the terminal")


def run(args: argparse.Namespace) -> int:
    console = Console(plain=args.plain)
    began = time.perf_counter()
    options = parse_assignments(args.option)
    if args.quick:
        # Everything is small here: the thresholds below which sparsity does not pay would leave nothing to see.
        options = {"attention.min_keys": 0, "ffn.min_width": 0, **options}
    SPTConfig.from_options(options)
    inner = args.inner or ("eager" if args.quick else "inductor")
    modules = ["transformers.models.llama.modeling_llama", "spt_compiler.backend"]
    context = workers.start([*modules, "torch._inductor.compile_fx"] if inner == "inductor" else modules)

    problem = compiler_problem() if inner == "inductor" else None
    if problem:
        console.line(f"no C++ compiler ({problem}): both sides run with inner=aot_eager instead of Inductor")
        inner = "aot_eager"
    out = Path(args.out)
    for stale in ("start", "pretrain", "dense", "spt"):  # a demo starts anew; only its own folders go
        shutil.rmtree(out / stale, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)

    length = args.seq or (QUICK_LENGTH if args.quick else LENGTH)
    steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    pretrain_steps = args.pretrain_steps or (QUICK_STEPS if args.quick else PRETRAIN_STEPS)
    sizes = {**(QUICK_SIZES if args.quick else SIZES)}
    sizes["max_position_embeddings"] = max(length, sizes["max_position_embeddings"])
    arguments = (args.architecture, sizes, length, args.seed, str(out))
    workers.call(context, [workers.Job("prepare  ", 1, prepare, arguments)], console)

    pretrain = Run(
        name="pretrain", model=str(out / "start"), data=str(out / "english.safetensors"), out=str(out / "pretrain"),
        backend="none", steps=pretrain_steps, length=max(length // 2, 2), eval_batches=2, seed=args.seed,
        threads=1 if args.quick else 0,  # a model this small only waits for a second thread
    )  # fmt: skip
    dense = dataclasses.replace(
        pretrain, name="dense", model=str(out / "pretrain" / "model"), data=str(out / "code.safetensors"),
        out=str(out / "dense"), backend=inner, steps=steps, length=length, eval_every=max(1, steps // 3), eval_batches=4,
        learning_rate=5e-4, explain=True, seed=args.seed + 1, cold=True,
    )  # fmt: skip
    sparse = dataclasses.replace(dense, name="spt", out=str(out / "spt"), backend="spt", options={**options, "inner": inner})
    try:
        [english] = compare.train_variants(context, [pretrain], console)[0].values()
        # A quick run shows that everything works: its times mean nothing, so all of it runs at once.
        source = out / ("pretrain" if args.quick else "spt") / "model"
        exact = workers.Job("exact    ", 1, check_exact, (str(source), sparse.data, min(length, 512), sparse.options))
        results, [check] = compare.train_variants(context, [dense, sparse], console, beside=[exact], together=args.quick)
    except workers.Interrupted:
        console.line(f"interrupted; what was written is in {out}")
        return 130
    seconds = time.perf_counter() - began
    parameters = results["dense"]["parameters"]
    intro = [
        f"An unmodified {args.architecture} of {parameters / 1e6:.1f} million parameters over bytes, trained dense on "
        f"Python's help pages (held-out loss {english['heldout_loss']:.3f}), then fine-tuned twice from there on the "
        f"source of Python's standard library: dense under {inner}, and sparse with model.compile(backend='spt').",
        "Same loop, optimizer, batches, seeds. Held-out text is from other modules. The sparse model is approximate.",
    ]
    paths = compare.finish(console, out, "spt demo", intro, results, check, dense, seconds)
    console.line()
    for path in [*paths, out / "dense" / "model", out / "spt" / "model"]:
        console.line(f"wrote {path}")
    console.line(f"done in {format_seconds(seconds)}")
    return 0 if check["passed"] else 1


def prepare(architecture: str, sizes: dict, length: int, seed: int, out: str, *, report: Any, should_stop: Any) -> None:
    """Writes the untrained model and both texts."""
    import torch
    import transformers

    from spt_compiler.cli import models

    transformers.utils.logging.disable_progress_bar()
    folder = Path(out)
    report({"event": "note", "text": "model and texts"})
    torch.manual_seed(seed)
    names = {"intermediate_size": "n_inner", "max_position_embeddings": "n_positions"}  # GPT-2 says it so
    config = models.config_for(architecture, {**sizes, **{names[k]: v for k, v in sizes.items() if k in names}, **_NO_DROPOUT})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "start")
    english = training.byte_tokens(training.english_bytes())
    cut = len(english) * 9 // 10
    training.write_data(folder / "english.safetensors", english[:cut], english[cut:], length)
    training.write_data(
        folder / "code.safetensors",
        training.byte_tokens(training.code_bytes(training.CODE_MODULES)),
        training.byte_tokens(training.code_bytes(training.HELD_OUT_MODULES)),
        length,
    )
    report({"event": "step", "done": 1})


# Dropout on attention probabilities would take the fused kernel away from the dense side.
_NO_DROPOUT = {
    "use_cache": False,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}


def check_exact(model: str, data: str, length: int, options: dict, *, report: Any, should_stop: Any) -> dict:
    """`training.exact_check` as a worker's function."""
    report({"event": "note", "text": "comparing with eager"})
    outcome = training.exact_check(model, data, length, options)
    report({"event": "step", "done": 1})
    return outcome
