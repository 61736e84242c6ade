"""Images: loading, normalising, augmenting."""
from dpkit.data.augment import AugmentSpec, apply, augment, cutmix, draw
from dpkit.data.sets import Dataset, DataSpec, DataUnavailable, load, statistics
from dpkit.data.split import Split, normalise, per_class_indices

__all__ = ["AugmentSpec", "DataSpec", "DataUnavailable", "Dataset", "Split", "apply", "augment", "cutmix", "draw", "load",
           "normalise", "per_class_indices", "statistics"]
