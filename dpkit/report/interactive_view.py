"""What the interactive views have in common: how they show themselves, short numbers, a limit on their size."""
from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import plotly.io

LIMIT = 400_000  # bytes of HTML of one view
FONT, SMALL = {"family": "sans-serif", "size": 12}, {"size": 11}
MENU = {"showactive": True, "pad": {"t": 0, "b": 0}, "bgcolor": "white", "bordercolor": "#BBBBBB", "font": SMALL,
        "xanchor": "left", "yanchor": "bottom"}
NOTE = {"xref": "paper", "yref": "paper", "showarrow": False, "yanchor": "bottom", "xanchor": "left"}


@dataclass
class View:
    """A plotly figure as data and layout. It shows itself: in the book as HTML without plotly.js, in Jupyter by its own type."""

    figure: dict[str, Any] = field(repr=False)  # its text would be longer than its picture
    name: str

    @cached_property
    def html(self) -> str:
        """A piece of a page that draws the figure where plotly.js is loaded. Its identifier follows from what it shows."""
        text = json.dumps(self.figure)
        identifier = f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        return plotly.io.to_html(self.figure, include_plotlyjs=False, full_html=False, div_id=identifier,
                                 default_height=f"{self.figure['layout']['height']}px", validate=False,
                                 config={"displayModeBar": False, "responsive": True})

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"application/vnd.plotly.v1+json": self.figure, "text/html": self.html}


def plain(values: np.ndarray, digits: int = 3) -> list:
    """``values`` to so many significant digits, None where they are not finite: a few bytes each."""
    def short(v: float) -> float | int | None:
        if not np.isfinite(v):
            return None
        rounded = float(f"{v:.{digits}g}")
        return int(rounded) if rounded == int(rounded) else rounded

    values = np.asarray(values, dtype=float)
    return [short(v) for v in values] if values.ndim == 1 else [plain(row, digits) for row in values]


def sized(view: View, limit: int) -> View:
    """The view, unless its HTML is too long. Raises ``ValueError`` with both sizes."""
    if len(view.html) > limit:
        raise ValueError(f"the view must fit in {limit} bytes of HTML, but takes {len(view.html)}; show fewer arms, or a coarser "
                         f"grid")
    return view
