"""Speed, measured: ours against named references in pairs, and against what the machine could do at best.

Ratios are what counts, not seconds: both sides of a pair run within the same minute, in turn. See ``book/performance.md``.
"""
from dpkit.bench.runner import names, run

__all__ = ["names", "run"]
