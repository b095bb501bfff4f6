"""Selection rules of sparse attention: one small file per rule, listed here by name."""

from __future__ import annotations

from spt_compiler.ops.selection import mean, pq, pq_match
from spt_compiler.ops.selection.common import Rule

RULES: dict[str, Rule] = {rule.name: rule for rule in (pq.RULE, mean.RULE, pq_match.RULE)}
