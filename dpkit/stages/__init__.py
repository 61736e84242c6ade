"""Stages: where mathematics meets disk. A study's settings become units, units become artifacts."""
from dpkit.stages import bend, compare, connect, make, measure, sets, terrain  # noqa: F401  importing them registers their stages
from dpkit.stages.arms import ARMS, CONTROLS, SUFFIXES
from dpkit.stages.design import Design, read_design
from dpkit.stages.places import Entry
from dpkit.stages.plan import CHAPTERS, FRAMES, Plan, parse_share
from dpkit.stages.profiles import FIELDS, load_study, profiles, read_profile, unknown
from dpkit.stages.run import Progress, Report, choose_device, compute, missing
from dpkit.stages.study import Study
from dpkit.stages.unit import STAGES, Context, Unit, closure

__all__ = ["ARMS", "CHAPTERS", "CONTROLS", "FIELDS", "FRAMES", "STAGES", "SUFFIXES", "Context", "Design",
           "Entry", "Plan", "Progress", "Report", "Study", "Unit",
           "choose_device", "closure", "compute", "load_study", "missing", "parse_share", "profiles", "read_design",
           "read_profile", "unknown"]
