"""Report: frames, numbers, figures and verdicts from what is in the store. Nothing here trains.

``dpkit.report.figures`` and the other modules of figures are imported on their own: they need matplotlib or plotly, which a
machine that only computes may not have.
"""
from dpkit.report.arms import averages, family, ordered, paired
from dpkit.report.change import changes
from dpkit.report.effects import effects
from dpkit.report.format import number_text
from dpkit.report.frames import GROUPS, TITLES, costs, curves, frame, group, histories, spent, summary
from dpkit.report.numbers import Number, all_numbers, number
from dpkit.report.verdicts import combine, judge, read_claims, verdicts

__all__ = [
           "GROUPS",
           "TITLES",
           "Number",
           "all_numbers",
           "averages",
           "changes",
           "combine",
           "costs",
           "curves",
           "effects",
           "family",
           "frame",
           "group",
           "histories",
           "judge",
           "number",
           "number_text",
           "ordered",
           "paired",
           "read_claims",
           "spent",
           "summary",
           "verdicts",
]
