"""Error and loss of one network, and of many on the same images: paths and grids are hundreds of them.

Nothing is copied into modules and nothing is read back on the way: weights are the arguments of one function, counts and sums
stay on the device until the end, and the images are put into the form that the function likes once for all networks.
"""
from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from dpkit import cores, models, tree
from dpkit.models import reestimation
from dpkit.training.gradient import can_compile, unbuilt
from dpkit.tree import Buffers, Params

IGNORED = -100  # the label of images that only fill up the last chunk
CHUNK = 500  # images a forward pass
COMPILED_CHUNK = 100  # the same for compiled functions on a CPU: 12% faster than 500 (measured, ConvNet-3-128 in bf16)
PAYS = 15.0  # seconds of eager work from which compiling (5 to 10 s) is worth it


@torch.no_grad()
def evaluate_many(model: models.ModelSpec, count: int, network: Callable[[int], tuple[Params, Buffers]], images: Tensor,
                  labels: Tensor, *, statistics_images: Tensor | None = None, precision: str = "fp32",
                  compiled: bool | None = None, form: str = "auto", threads: int = 1) -> tuple[Tensor, Tensor]:
    """Error in [0, 1] and mean cross-entropy (nats) of ``count`` networks in eval mode: two float64 tensors (count,) on the CPU.

    network: i -> parameters and buffers of network i, on the device of the images; called once each, and at most one block
        of networks (``threads`` of them on a CPU) exists at a time.
    images: (N, C, S, S) normalised float32.  labels: (N,) int64.
    statistics_images: (M, C, S, S), on which BatchNorm means and variances are measured anew for each network.
    precision: ``bf16`` runs all but the classifier in bfloat16.
    compiled: fuse the forward pass with torch.compile, in channels_last; by default where :func:`pays` says so. Results then
        differ by rounding.
    form: ``solo`` takes the networks in turn and gives the same bits as each alone; ``vmap`` takes as many as fit together,
        equal within rounding; ``auto`` is vmap on a GPU.
    threads: Python threads that share the networks, one core each; the same bits for any number.
    Raises ``ValueError`` when there are no images or not a label for each, or on another ``form`` or ``precision``.
    """
    models.check_evaluation(images, labels)
    for name, value, allowed in (("form", form, ("auto", "solo", "vmap")), ("precision", precision, ("fp32", "bf16"))):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    if compiled is None:
        compiled = pays(model, count * (len(images) + (0 if statistics_images is None else len(statistics_images))))
    if compiled and can_compile():
        try:
            return _evaluated(model, count, network, images, labels, statistics_images, precision, True, form, threads)
        except Exception as error:
            if not unbuilt(error):
                raise
            warnings.warn(f"networks cannot be compiled here ({type(error).__name__}): slower, with the same mathematics",
                          stacklevel=2)
    return _evaluated(model, count, network, images, labels, statistics_images, precision, False, form, threads)


def _evaluated(model: models.ModelSpec, count: int, network: Callable[[int], tuple[Params, Buffers]], images: Tensor,
               labels: Tensor, statistics_images: Tensor | None, precision: str, compiled: bool, form: str,
               threads: int) -> tuple[Tensor, Tensor]:
    """:func:`evaluate_many` without its checks."""
    vmap = form == "vmap" or (form == "auto" and images.is_cuda)
    layout = torch.channels_last if compiled else torch.contiguous_format
    score, moments = _functions(model, precision, compiled, vmap)
    chunks = _chunks(images, labels, COMPILED_CHUNK if compiled and not images.is_cuda else CHUNK, compiled, layout)
    source = []
    if statistics_images is not None and models.statistics(model):
        source = [x.contiguous(memory_format=layout) for x in reestimation.pieces(model, statistics_images)]
    totals = torch.zeros(count, 2, dtype=torch.float64, device=images.device)

    @torch.no_grad()  # a thread starts with gradients on
    def run(block: range) -> None:
        networks = [network(i) for i in block]
        params, buffers = (tree.stack(trees) if vmap else trees[0] for trees in zip(*networks, strict=True))
        if not vmap:
            params = {name: t.contiguous(memory_format=layout) if t.dim() == 4 else t for name, t in params.items()}
        if source:
            buffers = reestimation.replaced(buffers, [moments(params, buffers, x) for x in source])
        total = totals[block.start:block.stop]
        for x, y in chunks:
            total += score(params, buffers, x, y)

    size = fitting(model, count, images) if vmap else 1
    blocks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    if threads == 1 or len(blocks) == 1:
        for block in blocks:
            run(block)
    else:
        run(blocks[0])  # compiles, once
        _in_threads(run, blocks[1:], threads)
    return (totals.cpu() / len(images)).unbind(1)


def evaluate(model: models.ModelSpec, params: Params, buffers: Buffers, images: Tensor, labels: Tensor,
             batch_size: int = 500) -> tuple[float, float]:
    """Error in [0, 1] and mean cross-entropy of one network in eval mode.

    images: (N, C, H, W) normalised float32; labels: (N,) int64. Raises ``ValueError`` when there are no images.
    """
    if len(images) == 0:
        raise ValueError("the evaluation set is empty; give at least one image")
    with torch.no_grad():
        total = sum(_score(model, "fp32", params, buffers, x, y)
                    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True))
    error, loss = (total.cpu() / len(images)).tolist()
    return error, loss


def pays(model: models.ModelSpec, images: int) -> bool:
    """Whether a forward pass over so many ``images``, all networks together, is long enough to compile it first.

    Decided by the work alone (rates of one core: 130 GFLOP/s, and 4 GB/s for the passes that are not fused), so that the
    choice, and with it the last bits of a result, is the same on every machine.
    """
    work = models.forward_work(model)
    return images * (work.flops / 130e9 + work.bytes / 4e9) > PAYS


def fitting(model: models.ModelSpec, count: int, images: Tensor) -> int:
    """How many networks go through together: activations of one chunk within half of the free memory, 2 GiB on a CPU."""
    free = _free(images.device) / 2 if images.is_cuda else 2**31
    needed = min(CHUNK, len(images)) * models.forward_work(model).bytes
    return max(1, min(count, int(free / needed)))


def _free(device: torch.device) -> int:
    """Bytes that tensors may still take on a GPU: what nobody holds, and what this process keeps of tensors that are gone."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _score(model: models.ModelSpec, precision: str, params: Params, buffers: Buffers, x: Tensor, y: Tensor) -> Tensor:
    """(2,) float64: how many of the images are classified wrongly, and the sum of their cross-entropies."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        inputs = models.features(model, params, buffers, x)
    name = models.classifier_name(model)
    weight = params[f"{name}.weight"]
    logits = F.linear(inputs.to(weight.dtype), weight, params[f"{name}.bias"])  # bf16 logits would tie
    wrong = ((logits.argmax(1) != y) & (y != IGNORED)).sum()
    return torch.stack([wrong.double(), F.cross_entropy(logits.double(), y, reduction="sum", ignore_index=IGNORED)])


def _moments(model: models.ModelSpec, precision: str, params: Params, buffers: Buffers, x: Tensor):
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        return reestimation.moments(model, params, buffers, x)


@functools.lru_cache(maxsize=8)
def _functions(model: models.ModelSpec, precision: str, compiled: bool, vmap: bool):
    """:func:`_score` and :func:`_moments` of one network, or of a population (P, ...) with ``vmap``."""
    score, moments = (functools.partial(f, model, precision) for f in (_score, _moments))
    if vmap:
        score, moments = torch.func.vmap(score, in_dims=(0, 0, None, None)), functools.partial(_population_moments, moments)
    if compiled:
        # one shape for all chunks and networks: nothing to be dynamic about
        score, moments = torch.compile(score, dynamic=False), torch.compile(moments, dynamic=False)
    return score, moments


def _population_moments(moments: Callable, params: Params, buffers: Buffers, x: Tensor):
    counts = {}

    def one(params: Params, buffers: Buffers):
        found = moments(params, buffers, x)
        counts.update({name: n for name, (_, _, n) in found.items()})  # numbers, which vmap does not return
        return {name: (mean, variance) for name, (mean, variance, _) in found.items()}

    return {name: (*pair, counts[name]) for name, pair in torch.func.vmap(one)(params, buffers).items()}


def _chunks(images: Tensor, labels: Tensor, size: int, full: bool, layout: torch.memory_format) -> list[tuple[Tensor, Tensor]]:
    """Chunks of ``size`` images; with ``full`` the last one is filled up, as another shape would compile again."""
    chunks = []
    for x, y in zip(images.split(size), labels.split(size), strict=True):
        if full and chunks and len(x) < size:
            missing = size - len(x)
            x, y = F.pad(x, (0, 0) * 3 + (0, missing)), F.pad(y, (0, missing), value=IGNORED)
        chunks.append((x.contiguous(memory_format=layout), y))
    return chunks


def _in_threads(run: Callable[[range], None], blocks: Sequence[range], threads: int) -> None:
    # each thread computes on one core; a network's numbers never depend on who else is at work
    with cores.used(1), ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, blocks))
