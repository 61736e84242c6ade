"""Distillation: small sets that stand in for the training set, each with the recipe that it needs."""
from dpkit.distill.coreset import EL2NSpec, HerdingSpec, KCenterSpec, RandomSpec, el2n, herding, k_center, random
from dpkit.distill.dc import DCSpec, DSASpec, dc, dsa
from dpkit.distill.decode import check_factor, decode, decode_images, mosaic
from dpkit.distill.dm import DMSpec, dm
from dpkit.distill.generator import GeneratorSpec, generator
from dpkit.distill.idc import IDCSpec, idc
from dpkit.distill.interface import Made, MethodSpec, Task, Trajectory
from dpkit.distill.methods import METHODS, distil, spec_of
from dpkit.distill.mtt import MTTSpec, mtt
from dpkit.distill.spec import MatchingSpec

__all__ = ["METHODS", "DCSpec", "DMSpec", "DSASpec", "EL2NSpec", "GeneratorSpec", "HerdingSpec", "IDCSpec", "KCenterSpec",
           "MTTSpec", "Made", "MatchingSpec", "MethodSpec", "RandomSpec", "Task", "Trajectory", "check_factor", "dc", "decode",
           "decode_images", "distil", "dm", "dsa", "el2n", "generator", "herding", "idc", "k_center", "mosaic", "mtt", "random",
           "spec_of"]
