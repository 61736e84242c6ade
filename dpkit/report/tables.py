"""Tables that show all their rows: pandas leaves out all but ten of more than sixty, and cuts long texts."""
from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

HEIGHT = 440  # pixels, beyond which a table scrolls


@dataclass(frozen=True)
class Whole:
    """A table that shows itself whole: in notebooks and in the book as HTML that scrolls in a box, elsewhere as text."""

    table: pd.DataFrame

    def _repr_html_(self) -> str:
        with pd.option_context("display.max_colwidth", None, "display.max_rows", None, "display.max_columns", None):
            html = self.table.to_html(max_rows=None, max_cols=None, border=0)
        return f'<div style="max-height: {HEIGHT}px; overflow: auto">\n{html}\n</div>'

    def __repr__(self) -> str:
        return self.table.to_string(max_rows=None, max_cols=None, max_colwidth=None)


def whole(table: pd.DataFrame) -> Whole:
    """``table``, to be shown with all rows, columns and words."""
    return Whole(table)
