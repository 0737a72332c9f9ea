"What a network minimises."
from .segmentation import BCEDice, CEDice
from .semantic_consistency import AuxiliaryLoss, image_consistency, modality_consistency

__all__ = ["AuxiliaryLoss", "BCEDice", "CEDice", "image_consistency", "modality_consistency"]
