"""Distillation: small sets that stand in for the training set, each with the recipe that it needs."""
from dpkit.distill.coreset import herding, random
from dpkit.distill.decode import check_factor, decode, decode_images, mosaic
from dpkit.distill.idc import distil as idc
from dpkit.distill.spec import METHODS, Distilled, DistillSpec

__all__ = ["METHODS", "DistillSpec", "Distilled", "check_factor", "decode", "decode_images", "herding", "idc", "mosaic",
           "random"]
