"""Report: frames, numbers, figures and verdicts from what is in the store. Nothing here trains.

``dpkit.report.figures`` is imported on its own: it needs matplotlib, which a machine that only computes may not have.
"""
from dpkit.report.format import number_text
from dpkit.report.frames import GROUPS, TITLES, costs, curves, frame, group, histories, spent, summary
from dpkit.report.numbers import Number, all_numbers, number
from dpkit.report.verdicts import combine, judge, read_claims, verdicts

__all__ = ["GROUPS", "TITLES", "Number", "all_numbers", "combine", "costs", "curves", "frame", "group", "histories", "judge",
           "number", "number_text", "read_claims", "spent", "summary", "verdicts"]
