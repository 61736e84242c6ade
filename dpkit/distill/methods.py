"""All methods by name: their settings, the function behind each, and the trained networks that some of them need."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpkit.distill.coreset import EL2NSpec, HerdingSpec, KCenterSpec, RandomSpec, el2n, herding, k_center, random
from dpkit.distill.dc import DCSpec, DSASpec, dc, dsa
from dpkit.distill.dm import DMSpec, dm
from dpkit.distill.generator import GeneratorSpec, generator
from dpkit.distill.idc import IDCSpec, idc
from dpkit.distill.interface import Made, Maker, MethodSpec, Task
from dpkit.distill.mtt import MTTSpec, mtt


@dataclass(frozen=True)
class Method:
    """spec: the settings' class. make: (spec, task) -> Made. learned: whether images are learned, not chosen. networks: which
    trained networks ``task.networks`` must hold: nothing, ``trained`` (one, at its end), ``early`` (several, early in
    training) or ``experts`` (several, after every epoch)."""

    spec: type[MethodSpec]
    make: Maker
    learned: bool = True
    networks: str = ""


METHODS: dict[str, Method] = {found.spec.method: found for found in (
    Method(IDCSpec, idc),
    Method(DCSpec, dc),
    Method(DSASpec, dsa),
    Method(DMSpec, dm),
    Method(MTTSpec, mtt, networks="experts"),
    Method(GeneratorSpec, generator),
    Method(RandomSpec, random, learned=False),
    Method(HerdingSpec, herding, learned=False, networks="trained"),
    Method(KCenterSpec, k_center, learned=False, networks="trained"),
    Method(EL2NSpec, el2n, learned=False, networks="early"),
)}


def spec_of(values: Mapping[str, Any]) -> MethodSpec:
    """The settings written by :meth:`MethodSpec.to_dict`; raises ``ValueError`` on an unknown method."""
    name = values.get("method")
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}")
    return METHODS[name].spec(**{k: v for k, v in values.items() if k != "method"})


def distil(spec: MethodSpec, task: Task) -> Made:
    """Make a small set by the method that ``spec`` belongs to."""
    return METHODS[spec.method].make(spec, task)
