"""``validate`` and ``report``: the pruned model measured against the original, and what is written about it.

``FORMAT`` and ``VERSION`` stand in ``results.json``; ``results.schema.json`` beside this file is its schema, and
docs/guide/validating.md says what each field means.
"""

from __future__ import annotations

FORMAT = "prune-attn results"
VERSION = 1
RESULTS = "results.json"
UNFINISHED = "unfinished"  # the folder, beside them, of what a run that was stopped had finished
