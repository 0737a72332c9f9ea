"How good a segmentation is, in mm, on whole volumes."
from .cases import evaluate, summarise, table_to_latex, table_to_markdown, worst_cases
from .inference import predict_probabilities, predict_volume
from .metrics import evaluate_case

__all__ = ["evaluate", "evaluate_case", "predict_probabilities", "predict_volume", "summarise", "table_to_latex", "table_to_markdown", "worst_cases"]
