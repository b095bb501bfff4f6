"""Step time of the demo's fine-tuning, dense under Inductor against sparse, as a ratio from one run.

Both models live in one process and take turns, step by step, so that whatever else the machine does meets both alike.
Peak memory needs a process each and comes from `training.train`, which the bench command runs as well.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from spt_compiler.cli import training
from spt_compiler.cli.training import Run


def measure(runs: list[Run], steps: int, *, report: Any, should_stop: Any) -> dict[str, Any]:
    """Takes `steps` optimizer steps with each run's model, in turns, after three that compile and set up.

    Returns: by run name the median `forward`, `backward` and `step` seconds and the first and third quartile of steps;
        `ratio`, median of the step-by-step ratio of the second run to the first.
    """
    import torch
    import transformers
    from safetensors.torch import load_file

    transformers.utils.logging.disable_progress_bar()
    tokens = load_file(runs[0].data)["train"]
    sides = []
    for run in runs:
        torch.manual_seed(run.seed)
        model = transformers.AutoModelForCausalLM.from_pretrained(run.model, local_files_only=True, dtype=torch.float32)
        model.train()
        options = dict(run.options) if run.backend == "spt" else None
        model.compile(backend=run.backend, options=options)
        sides.append((run, model, torch.optim.AdamW(model.parameters(), lr=run.learning_rate), []))
    warm = 3
    for step in range(warm + steps):
        for run, model, optimizer, times in sides:
            batch = training.sample(tokens, run, step)
            start = time.perf_counter()
            loss = model(input_ids=batch, labels=batch).loss
            forward = time.perf_counter()
            loss.backward()
            backward = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            end = time.perf_counter()
            if step >= warm:
                times.append((forward - start, backward - forward, end - start))
        report({"event": "step", "done": step + 1})
    result: dict[str, Any] = {}
    for run, _, _, times in sides:
        whole = [total for _, _, total in times]
        quartiles = statistics.quantiles(whole, n=4) if len(whole) > 1 else [whole[0]] * 3
        result[run.name] = {
            "forward": statistics.median(f for f, _, _ in times),
            "backward": statistics.median(b for _, b, _ in times),
            "step": statistics.median(whole),
            "quartiles": [quartiles[0], quartiles[2]],
        }
    first, second = (times for _, _, _, times in sides)
    result["ratio"] = statistics.median(b[2] / a[2] for a, b in zip(first, second, strict=True))
    return result
