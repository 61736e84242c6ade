"""How many images fit in a memory bound: the product is rehearsed on tensors without storage, and its bytes are counted."""
from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Counts the bytes of tensors made while it is active: ``now``, those still alive; ``peak``, the most at one time.

    A storage shared by several tensors counts once, and those of ``given`` do not count. What a kernel takes for itself while
    it runs is not seen.
    """

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}
        for tensor in given:
            self._note(tensor, counts=False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes() if counts else 0
        if key in self._known and self._known[key]() is storage:
            return

        def gone(_: weakref.ref) -> None:
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


ENOUGH = 0.9
"""Share of a memory bound from which no larger chunk is looked for."""


def fitting(peak: Callable[[int], int], memory: int, most: int) -> int:
    """A count from 1 to ``most`` with ``peak(count) <= memory``; 0 where not even one fits.

    ``peak`` grows with the count. The count found is the largest, or one that fills :data:`ENOUGH` of the bound. Bytes grow
    nearly in proportion to the images, so a straight line between a count that fits and one that does not usually hits at the
    first try; every second try halves the range, in case it does not.
    """
    high, above = most, peak(most)
    if above <= memory:
        return most
    low, below = 1, peak(1) if most > 1 else above
    if below > memory:
        return 0
    straight = True
    while high - low > 1 and below < ENOUGH * memory:
        share = (memory - below) / (above - below) if straight else 0.5
        count = min(max(low + int(share * (high - low)), low + 1), high - 1)
        needed = peak(count)
        if needed <= memory:
            low, below = count, needed
        else:
            high, above = count, needed
        straight = not straight
    return low
