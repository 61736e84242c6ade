"""Training: one loop of stochastic gradient descent over a population of networks."""
from dpkit.training.loop import Diverged, Fit, State, batch, evaluate, fit
from dpkit.training.spec import TrainSpec

__all__ = ["Diverged", "Fit", "State", "TrainSpec", "batch", "evaluate", "fit"]
