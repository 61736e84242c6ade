"""Effects of factors: what each of a few choices does to every number, when all their combinations have been run.

The effect of a factor is the mean over the runs at its high level minus the mean over those at its low one (Box, Hunter and
Hunter, Statistics for Experimenters, 2nd edition 2005, chapter 5). Of two factors together it is half of what the effect of one
changes from the low level of the other to the high one, and so on. All of them are differences of the same numbers, so none costs
a run of its own, and each is computed initialisation by initialisation.
"""
from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from dpkit.report.change import values_of
from dpkit.report.numbers import Number, number
from dpkit.store import Store

Signs = tuple[int, ...]


def effect_name(name: str, factors: Sequence[str]) -> str:
    """The name of an effect of one factor, or of several together.

    >>> effect_name("connectivity.imp.barrier@59", ["noise"]), effect_name("distill.idc.accuracy", ["noise", "time"])
    ('connectivity.imp_effect_of_noise.barrier@59', 'distill.idc_effect_of_noise_x_time.accuracy')
    """
    place, dot, measure = name.rpartition(".")
    return f"{place}_effect_of_{'_x_'.join(factors)}{dot}{measure}"


def effects(store: Store, runs: Mapping[Signs, Sequence[Number]], factors: Sequence[str]) -> list[Number]:
    """Every effect on every number that all runs have: of each factor, of each two together, and so on.

    runs: the numbers of each run by the signs of its levels, -1 low and +1 high, all 2^k of them for k factors. Ratios, shares
    and bootstraps are left out, and so is what is the same artifact in all runs. Initialisations that a run lacks are left out,
    and n says so. Each effect is an artifact with the numbers of all runs as its parents.
    Raises ``ValueError`` where ``runs`` are not the 2^k.
    """
    if sorted(runs) != sorted(itertools.product((-1, 1), repeat=len(factors))):
        raise ValueError(f"effects of {len(factors)} factors need {2 ** len(factors)} runs, one for each combination of levels; "
                         f"got {len(runs)}")
    keys = {signs: {n.name: n.key for n in numbers} for signs, numbers in runs.items()}
    first = next(iter(runs.values()))
    several = [chosen for size in range(1, len(factors) + 1) for chosen in itertools.combinations(range(len(factors)), size)]
    found = []
    for name in (n.name for n in first):
        at = {signs: known.get(name) for signs, known in keys.items()}
        if None in at.values() or len(set(at.values())) == 1:
            continue
        sides = {signs: values_of(store, key) for signs, key in at.items()}
        if None in sides.values() or any(kind == "ratio" for kind, _ in sides.values()):
            continue
        seeds = sorted(set.intersection(*(set(values) for _, values in sides.values())))
        for chosen in several if seeds else ():
            made = {seed: effect({signs: values[seed] for signs, (_, values) in sides.items()}, chosen) for seed in seeds}
            found.append(number(store, effect_name(name, [factors[i] for i in chosen]), made, list(at.values())))
    return found


def effect(values: Mapping[Signs, float], chosen: Sequence[int]) -> float:
    """The effect of the factors ``chosen`` (their places) together on one value of each run.

    >>> both = {(-1, -1): 1.0, (1, -1): 3.0, (-1, 1): 2.0, (1, 1): 8.0}
    >>> effect(both, [0]), effect(both, [1]), effect(both, [0, 1])
    (4.0, 3.0, 2.0)
    """
    total = 0.0
    for signs, value in values.items():
        product = 1
        for i in chosen:
            product *= signs[i]
        total += product * value
    return total / (len(values) / 2)
