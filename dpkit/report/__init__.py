"""Report: frames, numbers, figures and verdicts from what is in the store. Nothing here trains.

``dpkit.report.figures`` is imported on its own: it needs matplotlib, which a machine that only computes may not have.
"""
from dpkit.report.format import number_text
from dpkit.report.frames import TITLES, curves, frame, spent, summary
from dpkit.report.numbers import Number, all_numbers, number
from dpkit.report.verdicts import combine, judge, read_claims, verdicts

__all__ = ["TITLES", "Number", "all_numbers", "combine", "curves", "frame", "judge", "number", "number_text",
           "read_claims", "spent", "summary", "verdicts"]
