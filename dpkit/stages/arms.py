"""The arms of a study by name: what each mask search sees, how it scores weights, and where its tickets start.

A name is a base, then a rewind scope of its own, then a control: ``distilled``, ``imp_weights``, ``distilled_shuffled``,
``imp_norm_only_reinit``. Bases are those of :data:`ARMS`, ``ltr_STEP`` (rewinding to another stored step of the dense run),
and every small set's own name: iterative magnitude pruning that searches with this set.
"""
from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection
from dataclasses import dataclass

from dpkit.prune import SCOPES

#: controls of any arm: what they change in its tickets
CONTROLS = {"borrowed": "with the mask that another initialisation found, its weights in the places that it says",
            "transferred": "with the mask that another initialisation found, its channels matched to this network's "
                           "(Adnan et al. 2025, arXiv 2505.05143, here by matching weights)",
            "reinit": "surviving weights drawn anew (Frankle and Carbin 2019, arXiv 1803.03635)",
            "shuffled": "survivors placed anew at random in each layer, as many as there were (Frankle et al. 2021, 2009.08576)",
            "signs": "surviving weights drawn anew, with their signs kept (Zhou et al. 2019, arXiv 1905.01067)"}
#: controls that take the mask of another initialisation
LENT = ("borrowed", "transferred")
#: scores at initialisation, which train no network but compute something
SCORES = ("snip", "grasp", "synflow")
#: scopes that a name may end in: what rewinding resets, where it is not the study's ``scope``
SUFFIXES = tuple(scope for scope in SCOPES if scope != "all")


@dataclass(frozen=True)
class Arm:
    """How an arm finds its tickets.

    source: what the search trains on: ``real``, the name of a small set, or ``none`` where nothing is trained. score: what
    keeps a weight: ``magnitude`` after the search's training, or at initialisation ``random``, ``snip``, ``grasp``, ``synflow``.
    once: prune to the sparsity of a round in one cut. early: tickets start from an early step of the dense run, ``step`` or
    the study's own. pretrained: the search itself starts there. training: how the search on real data differs (``usual``,
    ``large_batch``, ``early_stopped``). before: the arm whose masks come first. scope: the arm's own. control, of: a control
    of the arm ``of``. title: in words.
    """

    title: str
    source: str = "real"
    score: str = "magnitude"
    once: bool = False
    early: bool = False
    step: int | None = None
    pretrained: bool = False
    training: str = "usual"
    before: str = ""
    scope: str = ""
    control: str = ""
    of: str = ""

    @property
    def trains(self) -> bool:
        """Whether its search trains networks."""
        return self.source != "none"


ARMS: dict[str, Arm] = {
    "imp": Arm("IMP: all real data, rewound to initialisation (Frankle and Carbin 2019, arXiv 1803.03635)"),
    "ltr": Arm("IMP, rewound to an early step (Frankle et al. 2020, arXiv 1912.05671)", early=True),
    "distilled": Arm("distilled pruning: IMP on IDC's images (McDermott and Cummings 2023, arXiv 2307.03364)", "idc"),
    "distilled_pretrained": Arm("distilled pruning after early training on real data", "idc", early=True, pretrained=True),
    "combined": Arm("distilled pruning up to combined_round, then IMP", before="distilled"),
    "large_batch": Arm("IMP whose search takes batches of large_batch (Maene et al. 2021, arXiv 2106.06955)",
                       training="large_batch"),
    "early_stopped": Arm("IMP whose search trains for early_epochs only", training="early_stopped"),
    "one_shot": Arm("magnitudes of the dense network trained on real data, in one cut (Han et al. 2015)", once=True),
    "snip": Arm("SNIP on real images at initialisation (Lee et al. 2019, arXiv 1810.02340)", "none", "snip", once=True),
    "grasp": Arm("GraSP on real images at initialisation (Wang et al. 2020, arXiv 2002.07376)", "none", "grasp", once=True),
    "synflow": Arm("SynFlow at initialisation, without data (Tanaka et al. 2020, arXiv 2006.05467)", "none", "synflow",
                   once=True),
    "random": Arm("a random mask", "none", "random", once=True),
}

#: names that a small set cannot have, as they mean something else where arms, sets and sources are named
TAKEN = {"real": "all real data", "all_data": "all real data", "none": "a search without data", "dense": "the dense network",
         **{name: f"an arm ({arm.title})" for name, arm in ARMS.items()}}


def arm_of(name: str, sets: Collection[str], steps: Collection[int] = ()) -> Arm:
    """The arm of a name. sets: small sets that may be searched with; steps: of the dense run that are stored.

    Raises ``ValueError`` with one line on an unknown name, a step that is not stored, or a combination without meaning.
    """
    found = _base(name, sets, steps)
    if found:
        return found
    for control in CONTROLS:
        if name.endswith(f"_{control}"):
            of = name.removesuffix(f"_{control}")
            inner = arm_of(of, sets, steps)
            if inner.control:
                break
            return dataclasses.replace(inner, title=f"{inner.title}; {CONTROLS[control]}", control=control, of=of)
    for scope in SUFFIXES:
        if name.endswith(f"_{scope}"):
            inner = arm_of(name.removesuffix(f"_{scope}"), sets, steps)
            if inner.scope or inner.control:
                break
            if not inner.trains:
                raise ValueError(f"arm {name} must have a search that trains, whose parameters scope {scope} keeps; "
                                 f"{name.removesuffix(f'_{scope}')} trains nothing")
            return dataclasses.replace(inner, title=f"{inner.title}; rewound {scope}", scope=scope)
    near = difflib.get_close_matches(name, [*ARMS, *sets], n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(ARMS)}, ltr_STEP and the small sets."
    raise ValueError(f"unknown arm {name!r}; {hint} Behind a name may stand {', '.join(f'_{s}' for s in SUFFIXES)}, then "
                     f"{', '.join(f'_{c}' for c in CONTROLS)}; `dpkit arms` explains them")


def _base(name: str, sets: Collection[str], steps: Collection[int]) -> Arm | None:
    if name in ARMS:
        return ARMS[name]
    if name in sets:
        return Arm(f"IMP that searches with the small set {name}", name)
    word = name.removeprefix("ltr_")
    if word == name or not word.isdigit() or word != str(int(word)):
        return None
    if int(word) not in steps:
        stored = ", ".join(map(str, sorted(steps))) or "none"
        raise ValueError(f"arm {name} must rewind to one of the dense run's snapshots ({stored}), got {word}; "
                         "add it to snapshots")
    return dataclasses.replace(ARMS["ltr"], title=f"IMP, rewound to step {word}", step=int(word))
