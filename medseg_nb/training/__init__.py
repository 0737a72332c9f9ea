"How a network is fitted."
from .multimodal import MultimodalRecipe, MultimodalRun, load_multimodal, train_multimodal
from .supervised import Recipe, Run, load_run, train

__all__ = ["MultimodalRecipe", "MultimodalRun", "Recipe", "Run", "load_multimodal", "load_run", "train", "train_multimodal"]
