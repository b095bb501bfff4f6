"""The training loop behind `spt demo`, `spt finetune` and `spt bench`: data, steps, checkpoints, figures of one run.

One `Run` describes one variant (dense or sparse) completely and as plain JSON, so that it can cross to a process of its
own, be stored beside its checkpoints, and be compared on resume. Every variant goes through the same `train`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import hashlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spt_compiler.errors import SPTError, StateError

# Standard-library modules to fine-tune on, and others to test on: plain code, in every Python, of many authors.
CODE_MODULES = (
    "argparse ast asyncio.base_events asyncio.streams asyncio.tasks base64 bdb bisect bz2 calendar cmd code codecs "
    "collections configparser contextlib copy copyreg csv dataclasses datetime difflib dis doctest email.message enum "
    "fileinput fnmatch fractions ftplib functools getopt gettext glob gzip hashlib heapq hmac html.parser http.client "
    "http.cookies imaplib inspect json.decoder json.encoder keyword linecache locale logging lzma mailbox mimetypes "
    "netrc numbers opcode optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint profile "
    "pstats pyclbr pydoc queue random reprlib runpy sched secrets selectors shelve shlex shutil site smtplib socket"
).split()
HELD_OUT_MODULES = "abc ssl statistics string subprocess tarfile tempfile textwrap threading timeit trace zipfile".split()

RUN_FILE = "run.json"
RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Run:
    """One variant of a training run.

    Attributes:
        name: "dense", "spt", ...: how reports call it.
        model: folder with the start (config.json and weights), written by `save_pretrained`.
        data: a safetensors file with `train` and `heldout`, 1-d token ids.
        out: folder for checkpoints, the result, and the trained model.
        backend: "inductor", "spt", "aot_eager", "eager", or "none" (not compiled).  options: for backend "spt".
        steps, batch, length: optimizer steps; sequences per step; tokens per sequence.
        learning_rate, warmup: of AdamW; steps of linear warm-up.
        eval_every, eval_batches: steps between evaluations on held-out text (0: only at the end), batches in each.
        checkpoint_every: steps between checkpoints (0: none but at the end and on interruption).
        device, threads, autocast: "cpu" or "cuda"; 0 threads means torch's choice; autocast "none" or "bfloat16".
        explain: list the sites at the end.
        cold: give Inductor an empty cache, so that compile times compare; for a process of its own only.
    """

    name: str
    model: str
    data: str
    out: str
    backend: str = "inductor"
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 100
    batch: int = 1
    length: int = 512
    learning_rate: float = 1e-3
    warmup: int = 10
    eval_every: int = 0
    eval_batches: int = 4
    checkpoint_every: int = 0
    seed: int = 0
    device: str = "cpu"
    threads: int = 0
    autocast: str = "none"
    explain: bool = False
    cold: bool = False

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class History:
    """What a run has done so far; grows with the steps and travels with the checkpoint."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of each step
    heldout: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss)
    compile_steps: list[int] = field(default_factory=list)  # steps that compiled: the first of each process


# ---- data ---------------------------------------------------------------------------------------------------------


def english_bytes() -> bytes:
    """The English that every Python carries: the topics of its interactive help, about half a megabyte."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()


def code_bytes(modules: list[str] | tuple[str, ...]) -> bytes:
    """Source text of standard-library modules, joined; those that this Python lacks are left out."""
    import importlib.util

    texts = []
    for name in modules:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            spec = None
        if spec and spec.origin and spec.origin.endswith(".py"):
            texts.append(Path(spec.origin).read_bytes())
    if not texts:
        raise SPTError("no source of the standard library found: this Python ships compiled files only")
    return b"\n\n".join(texts)


def byte_tokens(text: bytes) -> Tensor:
    """Bytes as token ids, [len] int64."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def write_data(path: Path, train: Tensor, heldout: Tensor, length: int) -> None:
    """Stores token ids for `Run.data`.

    Raises: SPTError if either is shorter than one sequence of `length` tokens and the token that follows.
    """
    from safetensors.torch import save_file

    for name, tokens in (("training", train), ("held-out", heldout)):
        if len(tokens) < length + 1:
            raise SPTError(f"the {name} text has {len(tokens)} tokens, expected at least {length + 1}: more text or less --seq")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"train": train.contiguous(), "heldout": heldout.contiguous()}, temporary)
    os.replace(temporary, path)


def sample(tokens: Tensor, run: Run, step: int) -> Tensor:
    """The batch of a step, [batch, length]: a function of (seed, step) alone, so that a resumed run sees the same."""
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - run.length, (run.batch,), generator=generator)
    return torch.stack([tokens[start : start + run.length] for start in starts])


def heldout_batches(tokens: Tensor, run: Run) -> Iterator[Tensor]:
    """`run.eval_batches` batches [batch, length], evenly spread over the held-out text."""
    count = run.eval_batches * run.batch
    last = len(tokens) - run.length
    starts = [last * i // max(count - 1, 1) for i in range(count)]
    for i in range(0, count, run.batch):
        yield torch.stack([tokens[start : start + run.length] for start in starts[i : i + run.batch]])


# ---- memory -------------------------------------------------------------------------------------------------------


class PeakMemory:
    """Peak resident memory of this process (device memory on a GPU) between each `start()` and `stop()`; `peak`, bytes.

    Linux lets a process reset its own high-water mark; elsewhere the peak counts from the start of the process, the
    compiler's own memory included, and `whole_process` is True.
    """

    def __init__(self, device: str):
        self.device = device
        self.whole_process = False
        self.peak: int | None = None
        self._running = False

    def start(self) -> None:
        self._running = True
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            return
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what the compiler has freed is not the training's memory
        except (OSError, AttributeError):
            pass
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.whole_process = True

    def stop(self) -> None:
        """What follows (an evaluation, a checkpoint) is not counted until the next `start()`."""
        if self._running:
            self._running = False
            now = self._high_water()
            self.peak = now if self.peak is None else max(self.peak, now or 0)

    def _high_water(self) -> int | None:
        if self.device.startswith("cuda"):
            return int(torch.cuda.max_memory_allocated())
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        try:
            import resource
            import sys
        except ImportError:
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def saved_bytes(loss: Tensor, model: torch.nn.Module) -> int:
    """Bytes that the graph behind `loss` keeps for backward, parameters and buffers not counted."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, Tensor) and value.layout == torch.strided:
            storage = value.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)

    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # Nodes of Python functions (compiled graphs, custom ops) list what they keep; those of C++ name each part.
        names = ["saved_tensors"] if hasattr(node, "saved_tensors") else [n for n in dir(node) if n.startswith("_saved_")]
        for name in names:
            try:
                add(getattr(node, name))
            except RuntimeError:  # already freed, or of a kind that cannot be read
                continue
        waiting.extend(next_node for next_node, _ in node.next_functions)
    return sum(sizes.values())


# ---- the loop -----------------------------------------------------------------------------------------------------


def train(run: Run, report: Callable[[dict[str, Any]], None], should_stop: Callable[[], bool] = lambda: False) -> dict:
    """Trains one variant, resuming from the newest checkpoint in `run.out` if there is one.

    Args:
        run: what to do.
        report: gets {"event": "step", "done", "loss"}, {"event": "note", "text"} as things happen.
        should_stop: asked after each step; True saves a checkpoint and returns.
    Returns: the result as plain JSON: `finished`, `history`, and once finished the figures of the report.
    Raises: StateError if the checkpoint belongs to another run; SPTError if the loss is not finite.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()  # ours is the one to watch
    if run.threads:
        torch.set_num_threads(run.threads)
    from safetensors.torch import load_file

    out = Path(run.out)
    out.mkdir(parents=True, exist_ok=True)
    if run.cold:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str((out / "inductor").resolve())
    data = load_file(run.data)
    checkpoint = newest_checkpoint(out)
    if checkpoint:
        _check_same_run(run, checkpoint)
    torch.manual_seed(run.seed)
    source = checkpoint / "model" if checkpoint else run.model
    # float32 whatever the folder holds: master weights of the optimizer; autocast lowers the compute.
    model = transformers.AutoModelForCausalLM.from_pretrained(source, local_files_only=True, dtype=torch.float32)
    model.to(run.device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.01)
    history = History()
    if checkpoint:
        history = _restore(checkpoint, model, optimizer, run)
        report({"event": "note", "text": f"resumed after step {len(history.losses)}"})
    if run.backend == "spt":
        model.compile(backend="spt", options=dict(run.options) or None)
    elif run.backend != "none":
        model.compile(backend=run.backend)
    evaluate = _evaluator(model, data["heldout"], run)
    memory = PeakMemory(run.device)
    measured_from = len(history.losses) + min(3, max(run.steps - len(history.losses) - 1, 0))
    history.compile_steps.append(len(history.losses))
    saved: int | None = None
    report({"event": "step", "done": len(history.losses), "text": "" if run.backend == "none" else "compiling"})

    def evaluation_is_due(done: int) -> bool:
        measured = {steps for steps, _ in history.heldout}
        return bool(run.eval_every) and 0 < done < run.steps and done % run.eval_every == 0 and done not in measured

    if evaluation_is_due(len(history.losses)):  # the interruption came first
        history.heldout.append((len(history.losses), evaluate()))
    for step in range(len(history.losses), run.steps):
        if step == measured_from:
            memory.start()
        started = time.perf_counter()
        batch = sample(data["train"], run, step).to(run.device)
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * min(1.0, (step + 1) / max(run.warmup, 1))
        with torch.autocast(run.device, torch.bfloat16, enabled=run.autocast == "bfloat16"):
            loss = model(input_ids=batch, labels=batch).loss
        if step == measured_from:
            paused = time.perf_counter()
            saved = saved_bytes(loss, model)
            started += time.perf_counter() - paused  # measuring is not training
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()  # waits for the device, too
        del loss
        history.seconds.append(time.perf_counter() - started)
        history.losses.append(value)
        if not _finite(value):
            raise SPTError(
                f"the loss of the {run.name} run is {value} after step {step + 1}; the last checkpoint is untouched, "
                "try a smaller --lr"
            )
        report({"event": "step", "done": step + 1, "loss": value})
        stop = should_stop()
        done = step + 1
        evaluates = not stop and evaluation_is_due(done)
        saves = stop or (run.checkpoint_every > 0 and done % run.checkpoint_every == 0 and done < run.steps)
        if (evaluates or saves) and step >= measured_from:
            memory.stop()
        if evaluates:
            history.heldout.append((done, evaluate()))
        if saves:
            path = save_checkpoint(run, model, optimizer, history)
            if stop:
                return {"name": run.name, "finished": False, "checkpoint": str(path), "history": _plain(history)}
        if (evaluates or saves) and step >= measured_from:
            memory.start()

    memory.stop()
    report({"event": "note", "text": "evaluating"})
    heldout = evaluate()
    if not history.heldout or history.heldout[-1][0] != run.steps:
        history.heldout.append((run.steps, heldout))
    if run.checkpoint_every:
        save_checkpoint(run, model, optimizer, history)
    model.save_pretrained(out / "model")
    result = {
        "name": run.name,
        "finished": True,
        "history": _plain(history),
        "step_seconds": median_step(history),
        "tokens_per_step": run.batch * run.length,
        "peak_bytes": memory.peak,
        "peak_is_whole_process": memory.whole_process,
        "saved_bytes": saved,
        "train_loss": statistics.fmean(history.losses[-max(1, min(10, run.steps // 4)) :]) if history.losses else None,
        "heldout_loss": heldout,
        "compile_seconds": compile_seconds(history),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sites": [],
    }
    if run.backend == "spt":
        import spt_compiler

        spt_compiler.save_state(model, str(out / "model" / "spt_state.safetensors"))
        if run.explain:
            report({"event": "note", "text": "listing the sites"})
            result["sites"] = _sites(model, sample(data["train"], run, 0).to(run.device), run)
            result["metrics"] = _plain(spt_compiler.metrics(model))
    if run.cold:
        shutil.rmtree(out / "inductor", ignore_errors=True)
    write_json(out / RESULT_FILE, result)
    return result


def _evaluator(model: Any, heldout: Tensor, run: Run) -> Callable[[], float]:
    """A function that measures the loss on held-out text, in eval mode and without gradients.

    The sparse variant stays sparse there, on the same learned state; its graph goes to aot_eager, as compiling it with
    Inductor would take longer than a short evaluation gains. The dense variant runs as written.
    """
    forward = model.forward
    if run.backend == "spt":
        options = {key: value for key, value in run.options.items() if key != "inner_options"}
        forward = torch.compile(model.forward, backend="spt", options={**options, "inner": _light_inner(options)})

    def evaluate() -> float:
        model.eval()
        try:
            with torch.no_grad(), torch.autocast(run.device, torch.bfloat16, enabled=run.autocast == "bfloat16"):
                losses = [
                    forward(input_ids=batch, labels=batch).loss.item()
                    for batch in (b.to(run.device) for b in heldout_batches(heldout, run))
                ]
        finally:
            model.train()
        return statistics.fmean(losses)

    return evaluate


def _light_inner(options: dict[str, Any]) -> str:
    """The run's inner compiler where it is quick to compile, else aot_eager."""
    inner = options.get("inner", "inductor")
    return "aot_eager" if inner == "inductor" else inner


def _sites(model: Any, batch: Tensor, run: Run) -> list[dict[str, Any]]:
    """Rows of `spt_compiler.explain` for the trained model."""
    import spt_compiler

    with torch.autocast(run.device, torch.bfloat16, enabled=run.autocast == "bfloat16"):
        explanation = spt_compiler.explain(model, options=dict(run.options) or None, input_ids=batch, labels=batch)
    return _plain(explanation.to_dict()["sites"])


def exact_check(folder: str, data: str, length: int, options: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Compares the rewritten model with everything selected against eager, outputs and every gradient.

    Args:
        folder: a trained model.  data: as `Run.data`.  length: tokens of the one sequence compared.
        options: of the sparse run; everything but the inner compiler is overruled by `exact`.
    Returns: {"logits": largest difference relative to the largest logit, "gradient": largest relative difference of the
        parameters' gradients (norms), "parameter": whose, "passed": both within 1e-4 and 1e-3}.
    """
    import transformers
    from safetensors.torch import load_file

    transformers.utils.logging.disable_progress_bar()
    tokens = load_file(data)["heldout"][None, :length]
    outcomes = []
    for exact in (False, True):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # two random masks cannot be compared
        model.train()
        if exact:
            kept = {key: value for key, value in options.items() if key != "inner_options"}
            model.compile(backend="spt", options={**kept, "exact": True, "inner": _light_inner(kept)})
        output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        outcomes.append((output.logits.detach(), gradients))
    (logits, gradients), (logits_exact, gradients_exact) = outcomes
    difference = ((logits - logits_exact).abs().max() / logits.abs().max()).item()
    # Relative to the parameter's own gradient, but not to rounding noise where that is nothing beside the others'.
    floor = 1e-6 * max(g.norm().item() for g in gradients.values())
    errors = {}
    for name, gradient in gradients.items():
        other = gradients_exact.get(name)
        missing = other is None or other.shape != gradient.shape
        errors[name] = float("inf") if missing else ((gradient - other).norm() / gradient.norm().clamp_min(floor)).item()
    worst = max(errors, key=lambda name: errors[name])
    passed = difference <= 1e-4 and errors[worst] <= 1e-3 and gradients.keys() == gradients_exact.keys()
    return {"logits": difference, "gradient": errors[worst], "parameter": worst, "passed": passed}


def median_step(history: History) -> float | None:
    """Median seconds of a step, without the first ones of each process (they compile and set up)."""
    settled = [
        seconds
        for step, seconds in enumerate(history.seconds)
        if not any(first <= step < first + 3 for first in history.compile_steps)
    ]
    return statistics.median(settled or history.seconds) if history.seconds else None


def compile_seconds(history: History) -> float | None:
    """What the first step took beyond an ordinary one."""
    median = median_step(history)
    return None if median is None else max(history.seconds[0] - median, 0.0)


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _plain(value: Any) -> Any:
    """As JSON holds it."""
    if isinstance(value, History):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return value.tolist()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


# ---- checkpoints --------------------------------------------------------------------------------------------------


def save_checkpoint(run: Run, model: Any, optimizer: torch.optim.Optimizer, history: History) -> Path:
    """Writes `checkpoint-<steps>`: model, optimizer, random state, learned sparse state, history. Removes older ones.

    It is built beside its place and moved there in one step, so an interruption leaves the previous one whole.
    """
    out = Path(run.out)
    final = out / f"checkpoint-{len(history.losses):08d}"
    temporary = out / f".tmp-{final.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary / "model")
    if run.backend == "spt":
        import spt_compiler

        spt_compiler.save_state(model, str(temporary / "spt_state.safetensors"))
    states = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    if run.device.startswith("cuda"):
        states["rng_cuda"] = torch.cuda.get_rng_state()
    torch.save(states, temporary / "training.pt")
    write_json(temporary / "history.json", _plain(history))
    write_json(temporary / RUN_FILE, run.to_json())
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if final.exists():  # of an earlier, interrupted attempt at the same step: equal by construction
        shutil.rmtree(final)
    os.replace(temporary, final)
    for older in out.glob("checkpoint-*"):
        if older.name < final.name:
            shutil.rmtree(older, ignore_errors=True)
    for leftover in out.glob(".tmp-checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    return final


def newest_checkpoint(out: Path) -> Path | None:
    """The complete checkpoint with the most steps in `out`, if any."""
    return max((path for path in out.glob("checkpoint-*") if path.is_dir()), default=None, key=lambda path: path.name)


def _check_same_run(run: Run, checkpoint: Path) -> None:
    """Raises StateError if the checkpoint was written by a run that would have gone another way."""
    try:
        before = json.loads((checkpoint / RUN_FILE).read_text())
    except (OSError, ValueError) as error:
        raise StateError(f"{checkpoint} cannot be read: {error}; remove it to start from the previous one") from None
    free = {"steps", "out", "model", "data", "eval_every", "eval_batches", "checkpoint_every", "explain", "name", "cold"}
    now = json.loads(json.dumps(run.to_json()))
    different = [key for key in now if key not in free and before.get(key) != now[key]]
    if different:
        what = ", ".join(f"{key} (was {before.get(key)!r}, now {now[key]!r})" for key in different)
        raise StateError(f"{checkpoint} belongs to a run with other settings: {what}; use the same, or another --out")


def _restore(checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer, run: Run) -> History:
    try:
        states = torch.load(checkpoint / "training.pt", map_location=run.device, weights_only=True)
        stored = json.loads((checkpoint / "history.json").read_text())
    except (OSError, ValueError, RuntimeError, EOFError, KeyError) as error:
        raise StateError(f"{checkpoint} is damaged: {error}; remove it to start again") from error
    optimizer.load_state_dict(states["optimizer"])
    torch.set_rng_state(states["rng"].cpu())
    if "rng_cuda" in states:
        torch.cuda.set_rng_state(states["rng_cuda"].cpu())
    if run.backend == "spt":
        import spt_compiler

        spt_compiler.load_state(model, str(checkpoint / "spt_state.safetensors"))
    stored["heldout"] = [(steps, loss) for steps, loss in stored["heldout"]]
    return History(**stored)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, replacing the file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def text_digest(data: bytes) -> str:
    """Names a text, to notice on resume that it has changed."""
    return hashlib.sha256(data).hexdigest()[:16]
