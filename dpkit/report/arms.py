"""Arms in the report: what their names say, which family they belong to, and what they have in common seed by seed."""
from __future__ import annotations

from collections.abc import Callable, Iterable

import pandas as pd

from dpkit.report.frames import TITLES
from dpkit.statistics import mean_interval

#: endings of names that say what rewinding leaves as the search trained it, and those of controls
SCOPES = {"_weights": "only weights rewound", "_norm_only": "norms left as trained"}
CONTROLS = {"_shuffled": "shuffled in layers", "_reinit": "fresh weights", "_signs": "fresh, signs kept",
            "_borrowed": "mask of another start", "_transferred": "mask of another start, matched"}

OTHERS, CHANGED = "other sets", "controls and other rewinding"
#: the families of arms, in the order in which they are shown; arms of one family are drawn together
FAMILIES = {"all real data": ("imp", "ltr", "large_batch", "early_stopped", "one_shot"),
            "synthetic images": ("distilled", "combined", "distilled_pretrained", "idc", "idc_factor1", "dc", "dsa", "dm", "mtt",
                                 "generator"),
            "chosen real images": ("random_real", "herding", "k_center", "el2n"), OTHERS: (),
            "pruned at initialisation": ("snip", "grasp", "synflow", "random"), CHANGED: ()}


def split(name: str) -> tuple[str, tuple[str, ...]]:
    """An arm's base and its endings, a scope before a control.

    >>> split("imp_weights_reinit"), split("ltr_500"), split("idc_factor1_soft_shuffled")
    (('imp', ('_weights', '_reinit')), ('ltr_500', ()), ('idc_factor1_soft', ('_shuffled',)))
    """
    found: tuple[str, ...] = ()
    for endings in (CONTROLS, SCOPES):
        ending = next((e for e in endings if name.endswith(e) and name != e and name not in TITLES), "")
        name, found = name.removesuffix(ending), (ending, *found) if ending else found
    return name, found


def is_control(name: str) -> bool:
    """Whether an arm changes the tickets of another one, whose search it shares."""
    return any(ending in CONTROLS for ending in split(name)[1])


def called(name: str) -> str:
    """How an arm or a set is called, endings in words.

    >>> called("distilled_shuffled"), called("ltr_500"), called("dm_soft")
    ('distilled, shuffled in layers', 'IMP, rewound to step 500', 'DM, soft labels')
    """
    base, endings = split(name)
    plain = base.removesuffix("_soft")
    step = plain.removeprefix("ltr_")
    text = f"IMP, rewound to step {step}" if step != plain and step.isdigit() else TITLES.get(plain, plain)
    if plain != base:
        text += ", soft labels"
    if endings:  # which correct the rest, or do not speak of it
        text = text.removesuffix(", rewound to start").removesuffix(" pruning (IDC)")
    return ", ".join([text, *({**SCOPES, **CONTROLS}[ending] for ending in endings)])


def family(name: str) -> str:
    """Which of :data:`FAMILIES` an arm belongs to.

    >>> [family(name) for name in ("ltr_500", "dm_soft", "imp_weights", "theirs")]
    ['all real data', 'synthetic images', 'controls and other rewinding', 'other sets']
    """
    base, endings = split(name)
    if endings:
        return CHANGED
    plain = "ltr" if base.startswith("ltr_") else base.removesuffix("_soft")
    return next((word for word, names in FAMILIES.items() if plain in names), OTHERS)


def ordered(names: Iterable[str]) -> list[str]:
    """Arms by family, each once, and within a family as :data:`FAMILIES` has them; ``dense`` first."""
    def place(name: str) -> tuple:
        base, endings = split(name)
        plain = base.removesuffix("_soft")
        members = [member for members in FAMILIES.values() for member in members]
        step = plain.removeprefix("ltr_")
        known = "ltr" if step != plain and step.isdigit() else plain
        return (name != "dense", [*FAMILIES].index(family(name)), members.index(known) if known in members else len(members),
                int(step) if step.isdigit() else 0, base, endings)

    return sorted(dict.fromkeys(names), key=place)


def averages(table: pd.DataFrame, by: list[str], column: str) -> pd.DataFrame:
    """Mean, interval and n of ``column`` for each group, over seeds (rows of one seed are averaged first).

    As :func:`dpkit.report.frames.summary`, but for values that are no fractions: nothing is cut, and values that are not
    defined are left out. Columns: those of ``by``, mean, low, high, n; low and high are the mean where n is 1.
    """
    records = []
    good = table[table["failed"].isna() & table[column].notna()] if len(table) else table
    for place, group in good.groupby(by, sort=False):
        values = group.groupby("seed")[column].mean().tolist()
        mean, low, high = mean_interval(values)
        records.append({**dict(zip(by, place if isinstance(place, tuple) else (place,), strict=True)), "mean": mean,
                        "low": mean if low is None else low, "high": mean if high is None else high, "n": len(values)})
    return pd.DataFrame.from_records(records, columns=[*by, "mean", "low", "high", "n"])


def paired(table: pd.DataFrame, column: str, to: str = "imp") -> pd.DataFrame:
    """Each arm minus the arm ``to`` at equal sparsity, initialisation by initialisation (children are averaged first).

    Columns: arm, percent, seed, difference, failed (None: only pairs of which both have a result are here).
    """
    wanted = ["arm", "percent", "seed", "difference", "failed"]
    if not len(table):
        return pd.DataFrame(columns=wanted)
    good = table[table["failed"].isna() & table[column].notna() & (table["percent"] > 0)]
    means = good.groupby(["arm", "percent", "seed"], sort=False)[column].mean().rename("value").reset_index()
    other = means[means["arm"] == to].drop(columns="arm").rename(columns={"value": "other"})
    both = means[means["arm"] != to].merge(other, on=["percent", "seed"])
    return both.assign(difference=both["value"] - both["other"], failed=None)[wanted]


def number_grid(text: Callable[[str], str], name: str, arms: Iterable[str], levels: Iterable[int]) -> pd.DataFrame:
    """Numbers as text, a row an arm and a column a sparsity in percent. name: with ``{arm}`` and ``{percent}`` in it."""
    levels = list(levels)
    rows = {called(arm): [text(name.format(arm=arm, percent=percent)) for percent in levels] for arm in arms}
    return pd.DataFrame.from_dict(rows, orient="index", columns=[f"{percent}%" for percent in levels]).rename_axis("arm")
