"How a network is fitted."
from .multimodal import MultimodalRecipe, MultimodalRun, load_multimodal, train_multimodal
from .semisupervised import METHODS, SemisupervisedRecipe, train_semisupervised
from .supervised import Recipe, Run, load_run, train

__all__ = ["METHODS", "MultimodalRecipe", "MultimodalRun", "Recipe", "Run", "SemisupervisedRecipe", "load_multimodal", "load_run", "train",
           "train_multimodal", "train_semisupervised"]
