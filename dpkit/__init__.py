"""dpkit: distillation, iterative magnitude pruning, linear mode connectivity and Hessians of small image networks."""

__version__ = "0.1.0"
