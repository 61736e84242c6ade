"""Stages that compare masks: those of all arms of one initialisation, and those along one training."""
from __future__ import annotations

from collections.abc import Mapping

import torch

from dpkit import prune
from dpkit.models import ModelSpec, layer_work, prunable
from dpkit.stages.make import network_of
from dpkit.stages.unit import Context, Output, Unit, stage
from dpkit.store import Artifact


@stage("masks", 1, tolerant=True)
def compare_masks(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Compare the masks of tickets of equal size. Arms whose ticket has no result are left out.

    Tensors over A arms and L prunable tensors (in the last place of L + 1 all together): kept (A, L), both (A, A, L), unique
    (A, L + 1) and effective (A, L), counts; jaccard and hamming (A, A, L + 1), with what chance gives at these densities in
    jaccard_chance and hamming_chance, and over all tensors given each one's density in jaccard_within and hamming_within
    (A, A); work (L,), multiply-adds of each tensor for one image. Result: the names of arms and tensors, the tensors' sizes.
    """
    model, masks = ModelSpec(**unit.spec["model"]), {}
    for arm in unit.spec["arms"]:
        if arm in parents:
            mask = parents[arm].group("mask")
            masks[arm] = {name: mask[name] for name in prunable(model)}
    found = prune.compare(masks)
    effective = torch.stack([torch.tensor([int(m.sum()) for m in prune.effective(model, mask).values()])
                             for mask in masks.values()])
    work = torch.tensor([layer.flops // 2 for layer in layer_work(model)])
    tensors = {name: getattr(found, name) for name in ("kept", "both", "jaccard", "hamming", "jaccard_chance", "hamming_chance",
                                                       "jaccard_within", "hamming_within", "unique")}
    return Output(tensors | {"effective": effective, "work": work},
                  {"arms": list(found.names), "tensors": list(found.tensors), "sizes": found.sizes.tolist()})


@stage("early_bird", 1)
def compare_along(context: Context, unit: Unit, parents: Mapping[str, Artifact]) -> Output:
    """Magnitude masks of one network along its training (You et al. 2020, arXiv 1909.11957).

    Tensors: distance (T, T), the share of weights in which two masks differ, in [0, 1]. Result: the steps, the sparsity.
    """
    network, count = parents["network"], unit.spec["count"]
    steps = sorted(network.meta["spec"]["snapshots"])
    networks = [network_of(network, f"{step}/")[0] for step in steps]
    like = prune.full(ModelSpec(**unit.spec["model"]), networks[0])
    distance = prune.early_bird(networks, like, count)
    return Output({"distance": distance}, {"steps": steps, "percent": 100 * (1 - count / prune.size(like))})
