"How a network is fitted."
from .supervised import Recipe, Run, load_run, train

__all__ = ["Recipe", "Run", "load_run", "train"]
