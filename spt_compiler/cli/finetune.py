"""`spt finetune`: fine-tunes the user's model on the user's text, dense and sparse from the same start, resumable."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from spt_compiler.cli import compare, demo, training, workers
from spt_compiler.cli.console import Console, format_seconds
from spt_compiler.cli.doctor import compiler_problem
from spt_compiler.cli.training import Run
from spt_compiler.config import SPTConfig, parse_assignments
from spt_compiler.errors import SPTError

ARGUMENTS_FILE = "finetune.json"

# A causal LM over bytes for `--model TYPE`: small enough for a CPU.
SIZES = {**demo.SIZES, "num_hidden_layers": 4, "n_inner": 1024}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text to train on; its last tenth is held out")
    parser.add_argument("--model", metavar="DIR|TYPE", help="model folder (with a tokenizer, else bytes), or architecture")
    parser.add_argument("--out", default="out/finetune", metavar="DIR", help="where to write (out/finetune)")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run in --out stopped")
    parser.add_argument("--only", choices=("dense", "spt"), help="train one variant alone (both, to compare)")
    parser.add_argument("--steps", type=int, help="optimizer steps (200)")
    parser.add_argument("--seq", type=int, help="tokens per sequence (1024)")
    parser.add_argument("--batch", type=int, help="sequences per step (1)")
    parser.add_argument("--lr", type=float, help="learning rate of AdamW (5e-4 from an architecture, 2e-5 from a folder)")
    parser.add_argument("--checkpoint-every", type=int, help="steps between checkpoints (25)")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument("--autocast", choices=("none", "bfloat16"), help="compute precision (none: float32)")
    parser.add_argument("--inner", choices=("inductor", "aot_eager", "eager"), help="compiler of both sides (inductor)")
    parser.add_argument("--option", action="append", metavar="KEY=VALUE", help="an option of the backend")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--plain", action="store_true", help="plain text, whatever the terminal")


# What an argument is where neither the command line nor the run to resume says so.
_DEFAULTS: dict[str, Any] = {
    "text": None, "model": None, "only": None, "steps": 200, "seq": 1024, "batch": 1, "lr": None,
    "checkpoint_every": 25, "device": None, "autocast": "none", "inner": "inductor", "option": [], "seed": 0,
}  # fmt: skip


def run(args: argparse.Namespace) -> int:
    console = Console(plain=args.plain)
    began = time.perf_counter()
    out = Path(args.out)
    settings = _settings(args, out)
    options = parse_assignments(settings["option"])
    SPTConfig.from_options(options)
    if settings["device"] is None:
        import torch

        settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    inner = settings["inner"]
    problem = compiler_problem() if inner == "inductor" and settings["device"] == "cpu" else None
    if problem:
        console.line(f"no C++ compiler ({problem}): running with inner=aot_eager instead of Inductor")
        inner = "aot_eager"
    text = Path(settings["text"])
    digest = training.text_digest(text.read_bytes())
    if settings.get("digest", digest) != digest:
        raise SPTError(f"{text} has changed since the run in {out} began; restore it, or start anew in another --out")
    settings["digest"] = digest
    training_folder = Path(settings["model"]).is_dir()
    if settings["lr"] is None:
        settings["lr"] = 2e-5 if training_folder else 5e-4

    context = workers.start(["spt_compiler.backend"])
    if not (out / ARGUMENTS_FILE).exists():
        # Written last: a preparation that was interrupted is done again.
        workers.call(context, [workers.Job("prepare  ", 1, prepare, (settings, str(out)))], console)
    training.write_json(out / ARGUMENTS_FILE, settings)

    dense = Run(
        name="dense",
        model=str(out / "start"),
        data=str(out / "text.safetensors"),
        out=str(out / "dense"),
        backend=inner,
        steps=settings["steps"],
        batch=settings["batch"],
        length=settings["seq"],
        learning_rate=settings["lr"],
        eval_every=max(1, settings["steps"] // 5),
        checkpoint_every=settings["checkpoint_every"],
        seed=settings["seed"],
        device=settings["device"],
        autocast=settings["autocast"],
        explain=True,
    )
    sparse = dataclasses.replace(dense, name="spt", out=str(out / "spt"), backend="spt", options={**options, "inner": inner})
    variants = [r for r in (dense, sparse) if settings["only"] in (None, r.name)]
    check = None
    try:
        results, _ = compare.train_variants(context, variants, console)
        if "spt" in results:
            arguments = (str(out / "spt" / "model"), sparse.data, min(settings["seq"], 512), sparse.options)
            [check] = workers.call(context, [workers.Job("exact    ", 1, demo.check_exact, arguments)], console)
    except workers.Interrupted:
        console.line(f"interrupted; go on with: spt finetune --resume --out {out}")
        return 130
    for name in results:  # a model folder that loads anywhere has its tokenizer
        for path in (out / "start").glob("token*"):
            shutil.copy2(path, out / name / "model" / path.name)
    intro = [
        f"{settings['model']} fine-tuned on {text.name}: " + " and ".join(results) + ", from the same start.",
        "Same loop, optimizer, batches, seeds. The last tenth of the text is held out. The sparse model approximates.",
    ]
    paths = compare.finish(console, out, "spt finetune", intro, results, check, variants[0], time.perf_counter() - began)
    console.line()
    for path in [*paths, *(out / name / "model" for name in results)]:
        console.line(f"wrote {path}")
    console.line(f"done in {format_seconds(time.perf_counter() - began)}")
    return 0


def _settings(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The arguments: given now, else those of the run to resume, else the defaults.

    Raises: SPTError where a run would be lost, is missing, or would go on differently.
    """
    given = {name: getattr(args, name) for name in _DEFAULTS if getattr(args, name) is not None}
    stored: dict[str, Any] = {}
    if (out / ARGUMENTS_FILE).exists():
        if not args.resume:
            raise SPTError(f"{out} holds a run already: go on with --resume, choose another --out, or remove it")
        stored = json.loads((out / ARGUMENTS_FILE).read_text())
        # More steps, another rhythm of checkpoints, the other variant: harmless. The rest would make it another run.
        for name in given.keys() - {"steps", "checkpoint_every", "only"}:
            if given[name] != stored[name]:
                raise SPTError(
                    f"--{name.replace('_', '-')} {given[name]!r} differs from the run in {out} ({stored[name]!r}); "
                    "leave it out to go on, or choose another --out"
                )
    elif args.resume and (given.get("text") is None or given.get("model") is None):
        raise SPTError(f"{out} holds no run to resume; start one with --text FILE --model DIR|TYPE")
    settings = {**_DEFAULTS, **stored, **given}
    for name in ("text", "model"):
        if settings[name] is None:
            raise SPTError(f"--{name} is missing: spt finetune --text FILE --model DIR|TYPE")
    if not Path(settings["text"]).is_file():
        raise SPTError(f"--text {settings['text']}: expected a file")
    for name, least in (("steps", 1), ("seq", 2), ("batch", 1), ("checkpoint_every", 0)):
        if settings[name] < least:
            raise SPTError(f"--{name.replace('_', '-')} {settings[name]}: expected at least {least}")
    if settings["lr"] is not None and not 0 < settings["lr"] < math.inf:
        raise SPTError(f"--lr {settings['lr']}: expected a number above 0")
    if settings["device"] is not None:
        _check_device(settings["device"])
    return settings


def _check_device(name: str) -> None:
    """Raises SPTError where nothing can be trained: before the run is begun, as a run keeps to its device."""
    import torch

    count = torch.cuda.device_count()
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in known:
        raise SPTError(f"--device {name}: expected one of {', '.join(known)}")


def prepare(settings: dict[str, Any], out: str, *, report: Any, should_stop: Any) -> None:
    """Writes the model to start from, its tokenizer if it has one, and the tokens of the text."""
    import torch
    import transformers

    from spt_compiler.cli import models

    transformers.utils.logging.disable_progress_bar()
    folder, source = Path(out), Path(settings["model"])
    text = Path(settings["text"]).read_bytes()
    start = folder / "start"
    shutil.rmtree(start, ignore_errors=True)
    torch.manual_seed(settings["seed"])
    if source.is_dir():
        report({"event": "note", "text": f"reading {source}"})
        model = transformers.AutoModelForCausalLM.from_pretrained(source, local_files_only=True)
        tokenizer = _tokenizer(source)
    else:
        sizes = {**SIZES, "max_position_embeddings": max(settings["seq"], SIZES["max_position_embeddings"])}
        sizes["n_positions"] = sizes["max_position_embeddings"]
        config = models.config_for(settings["model"], sizes)
        model = transformers.AutoModelForCausalLM.from_config(config)
        tokenizer = None
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and settings["seq"] > limit:
        raise SPTError(f"--seq {settings['seq']} is longer than the model's max_position_embeddings, {limit}")
    if tokenizer is not None:
        report({"event": "note", "text": "tokenizing"})
        tokens = torch.tensor(tokenizer(text.decode("utf-8"), add_special_tokens=False)["input_ids"], dtype=torch.int64)
        tokenizer.save_pretrained(start)
    else:
        tokens = training.byte_tokens(text)
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokens) and int(tokens.max()) >= vocabulary:
        raise SPTError(
            f"the model has a vocabulary of {vocabulary}, the text needs {int(tokens.max()) + 1}"
            + ("" if tokenizer else ": bytes are used, as the folder holds no tokenizer")
        )
    model.config.use_cache = False
    model.save_pretrained(start)
    cut = len(tokens) - max(len(tokens) // 10, min(settings["seq"] + 1, len(tokens) // 2))
    training.write_data(folder / "text.safetensors", tokens[:cut], tokens[cut:], settings["seq"])
    report({"event": "step", "done": 1})


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; None if it has none."""
    import transformers

    if not any(folder.glob("token*")) and not any(folder.glob("vocab*")):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SPTError(f"{folder} has files of a tokenizer that cannot be loaded: {error}") from None
