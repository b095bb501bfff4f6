"""`spt explain`: which sites of a model become sparse, which do not, and why."""

from __future__ import annotations

import argparse
import json
import sys

from spt_compiler.cli.console import Console, at_least
from spt_compiler.config import SPTConfig, parse_assignments
from spt_compiler.errors import SPTError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="TYPE|DIR", help="architecture of transformers, or a folder")
    parser.add_argument("--full", action="store_true", help="default size of the architecture instead of a tiny one")
    parser.add_argument("--batch", type=at_least(1), default=2, help="batch size of the forward pass (2)")
    parser.add_argument("--seq", type=at_least(1), default=512, help="length of text inputs (512)")
    parser.add_argument("--eval", action="store_true", help="look at the model in eval mode without gradients")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the backend")
    parser.add_argument("--attention", choices=("sdpa", "eager"), help="attention implementation of the model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", metavar="FILE", help="write an HTML page as well")


def run(args: argparse.Namespace) -> int:
    options = parse_assignments(args.option)
    SPTConfig.from_options(options)  # a wrong option is said before a model is built

    import torch

    import spt_compiler
    from spt_compiler.cli import models

    torch.manual_seed(0)
    model, config = models.load(args.model, full=args.full)
    if args.attention:
        model.set_attn_implementation(args.attention)
    model.train(not args.eval)
    inputs = models.dummy_inputs(model, config, batch=args.batch, length=args.seq)
    with torch.set_grad_enabled(not args.eval):
        try:
            explanation = spt_compiler.explain(model, options=options, **inputs)
        except SPTError:
            raise
        except (RuntimeError, IndexError) as error:  # the model's own
            sizes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            raise SPTError(
                f"{type(model).__name__} cannot run on {sizes}: {type(error).__name__}: {str(error).splitlines()[0]}; try another "
                "--seq, or call spt_compiler.explain(model, ...) with an input of your own"
            ) from error
    if args.json:
        sys.stdout.write(json.dumps(explanation.to_dict(), indent=2) + "\n")
    else:
        Console().line(explanation.summary())
    if args.html:
        explanation.to_html(args.html)
        sys.stderr.write(f"wrote {args.html}\n")
    return 0
