"""Report: frames, numbers, figures and verdicts from what is in the store. Nothing here trains."""
from dpkit.report import figures
from dpkit.report.format import number_text
from dpkit.report.frames import TITLES, curves, frame, summary
from dpkit.report.numbers import Number, all_numbers, number
from dpkit.report.verdicts import combine, judge, read_claims, verdicts

__all__ = ["TITLES", "Number", "all_numbers", "combine", "curves", "figures", "frame", "judge", "number", "number_text",
           "read_claims", "summary", "verdicts"]
