"""Images: loading, normalising, augmenting."""
from dpkit.data.augment import AugmentSpec, Mix, apply, apply_cutmix, augment, cutmix, draw, draw_cutmix, table, uniforms
from dpkit.data.sets import Dataset, DataSpec, DataUnavailable, load, statistics
from dpkit.data.split import Split, normalise, per_class_indices

__all__ = ["AugmentSpec", "DataSpec", "DataUnavailable", "Dataset", "Mix", "Split", "apply", "apply_cutmix", "augment", "cutmix",
           "draw", "draw_cutmix", "load", "normalise", "per_class_indices", "statistics", "table", "uniforms"]
