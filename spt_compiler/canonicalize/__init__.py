"""Many spellings to one. Each rewrite keeps the meaning exactly; none knows what attention or an FFN is for.

What comes out (a pattern has to know these forms only):

    elementwise     operator.add/sub/mul/truediv/neg/pow/lt.../and_/or_/invert, torch.exp ..., F.relu, F.silu, F.gelu
    layout          torch.t (2-d), torch.permute, torch.reshape (static sizes written out), x[..., i, :] for one of a dim; no no-op;
                    torch.cat(parts, d), of which no slice is one of the parts
    casts           x.to(dtype), only where the dtype changes
    products        torch.matmul of activations; F.linear(x, w, b) for weights, torch.t on a weight stored (in, out); where a
                    whole block can be turned, its features come last, and tokens that are flat inside of it only are not;
                    what it shares with a layer beside it, a layer of each, and a factor of each token behind it; low-rank
                    branches right behind their layer
    softmax         F.softmax(x, dim=-1 or a positive dim); a dtype argument is a cast before it; a sink is one more key
    masks           torch.masked_fill(x, mask, number), torch.where(mask, x, number), x + floats; torch.nan_to_num(softmax)
    dropout         F.dropout(x, p, True) with p > 0, or nothing
    attention call  F.scaled_dot_product_attention(q, k, v, <only what differs from the default>)

Layout between two products around a softmax moves outside of them, so that scores and probabilities keep one rank and one
order of dims, keys last; what all rows share is broadcast to them, and what all keys share joins the output.
nn.MultiheadAttention is opened. In-place calls become functional where no alias can see the difference.

A rewrite is checked by its type: the replacement must have the shape, dtype and device of what it replaces (computed
on fake tensors, without guards on symbolic sizes), else it is undone.
"""

from __future__ import annotations

import logging

from torch import fx

from . import layers, products, scores, spelling  # noqa: F401  (importing them registers their rules)
from .editor import MAX_PASSES, Editor, rule
from .inplace import functionalize
from .opaque import expand_opaque
from .products import is_weight, swapped
from .spelling import one_index, place_inputs

__all__ = ["Editor", "canonicalize", "is_weight", "one_index", "rule", "swapped"]

log = logging.getLogger(__name__)


def canonicalize(module: fx.GraphModule) -> None:
    """Rewrites `module` in place to the forms listed above; running it again changes nothing.

    Args:
        module: a copy of a Dynamo graph, nodes with `meta["example_value"]`. New nodes carry the metadata of the node
            that they replace, and their own example value.
    """
    place_inputs(module.graph)
    editor = Editor(module)
    editor.sweep()
    expand_opaque(editor)
    functionalize(editor)
    for _ in range(MAX_PASSES):
        was_spelled = editor.is_spelled
        if not editor.run() and was_spelled:
            break
    else:
        log.debug("canonicalisation did not settle after %d passes", MAX_PASSES)
    module.graph.lint()
    module.recompile()
