"""Networks as pure functions of flat dictionaries: ``forward(spec, params, buffers, x, train)``.

No module objects: parameters and BatchNorm statistics go in and come out as ``dict[str, Tensor]``, so that
masks, interpolation, planes, populations (``torch.func.vmap``) and Hessians are ordinary tensor code. Inputs
are never mutated.
"""
from dpkit.models.checks import check_evaluation, check_same, spread
from dpkit.models.network import (
    classifier_name,
    count_prunable,
    features,
    forward,
    init,
    prunable,
    statistics,
)
from dpkit.models.reestimation import reestimate, statistics_source
from dpkit.models.sharing import check_buffers, check_labels, check_masks, check_shared, check_starts
from dpkit.models.spec import ARCHITECTURES, ModelSpec
from dpkit.models.work import LayerWork, Work, attention_work, forward_work, layer_work

__all__ = ["ARCHITECTURES", "LayerWork", "ModelSpec", "Work", "attention_work", "check_buffers", "check_evaluation",
           "check_labels", "check_masks", "check_same", "check_shared", "check_starts", "classifier_name", "count_prunable",
           "features", "forward", "forward_work", "init", "layer_work", "prunable", "reestimate", "spread", "statistics",
           "statistics_source"]
