"""A study of seconds with every chapter in it, and what its artifacts hold."""
from __future__ import annotations

import functools

import torch

from dpkit import data
from dpkit.stages import Plan, Study

torch.set_num_threads(1)  # as in a worker: equal bits

SETS = ("idc", "idc_factor1", "dc", "dsa", "dm", "mtt", "random_real", "herding", "k_center", "el2n", "idc_soft")
TINY = {"sets": SETS, "dc_outer": 2, "dc_inner": 2, "dc_real_batch": 8, "dc_network_epochs": 1, "dm_steps": 2, "dm_real_batch": 8,
        "mtt_steps": 2, "mtt_student_steps": 2, "mtt_expert_epochs": 1, "mtt_max_start_epoch": 1, "expert_count": 1,
        "expert_epochs": 2, "el2n_networks": 1, "train_images": 160, "test_images": 50, "width": 3, "epochs": 2,
        "batch_size": 32, "ipc": 1, "distill_outer": 2,
        "distill_inner": 1, "distill_network_images": 32, "set_epochs": 3, "evaluation_seeds": 1, "fraction": 0.4, "rounds": 2,
        "at_rounds": (2,), "rewind_epochs": 0.5, "seeds": 1, "points": 3, "plane_resolution": 3, "plane_images": 20,
        "hessian_images": 10, "probes": 2, "lanczos_steps": 2, "early_bird_points": 2, "plane_arms": ("dense",),
        "hessian_arms": ("dense", "imp"), "robust_arms": ("dense", "imp"), "corruptions": ("contrast",),
        "severities": (3,), "bits": (4,)}
CHAPTERS = ("data", "distillation", "tickets", "masks", "robustness", "connectivity", "landscape", "hessian")


@functools.cache
def plan(**changes):
    study = Study(**(TINY | changes))
    return Plan(study, data.load(study.data).identity)


def units(made, *chapters):
    return [e.unit for c in chapters or CHAPTERS for e in made.chapter(c)]


def contents(store, among=None):
    """Tensors and results by key: all that has to be equal when a computation is repeated."""
    artifacts = {key: store.get(key) for key in (store.keys() if among is None else among)}
    return {key: ({n: t.clone() for n, t in a.tensors.items()}, a.result, a.failed) for key, a in artifacts.items()}


def same(a, b):
    """Whether two contents are equal bit for bit."""
    return a.keys() == b.keys() and all(
        a[k][1:] == b[k][1:] and a[k][0].keys() == b[k][0].keys()
        and all(torch.equal(a[k][0][n], b[k][0][n]) for n in a[k][0]) for k in a)
