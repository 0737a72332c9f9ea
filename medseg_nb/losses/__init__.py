"What a network minimises."
from .segmentation import BCEDice, CEDice
from .semantic_consistency import AuxiliaryLoss, auxiliary_loss, consistency_losses, image_consistency, modality_consistency, structured_losses

__all__ = ["AuxiliaryLoss", "BCEDice", "CEDice", "auxiliary_loss", "consistency_losses", "image_consistency", "modality_consistency",
           "structured_losses"]
