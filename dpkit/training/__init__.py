"""Training: one loop of stochastic gradient descent over a population of networks."""
from dpkit.training.batches import Batches
from dpkit.training.evaluation import evaluate, evaluate_many
from dpkit.training.loop import Diverged, Fit, State, fit
from dpkit.training.spec import TrainSpec

__all__ = ["Batches", "Diverged", "Fit", "State", "TrainSpec", "evaluate", "evaluate_many", "fit"]
