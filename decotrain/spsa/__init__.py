"""SPSA: fine-tuning with forward passes and one byte on the wire for each sample."""

from decotrain.spsa.optimizer import SPSA, Step
from decotrain.spsa.recipe import Recipe

__all__ = ["SPSA", "Recipe", "Step"]
