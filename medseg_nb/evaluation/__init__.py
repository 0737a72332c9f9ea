"How good a segmentation is, in mm, on whole volumes."
from .cases import evaluate, summarise, table_to_latex, table_to_markdown, worst_cases
from .inference import predict_probabilities, predict_volume
from .lesions import LesionDetection, evaluate_lesions, lesion_detection, summarise_lesions
from .metrics import evaluate_case

__all__ = ["LesionDetection", "evaluate", "evaluate_case", "evaluate_lesions", "lesion_detection", "predict_probabilities", "predict_volume", "summarise",
           "summarise_lesions", "table_to_latex", "table_to_markdown", "worst_cases"]
