"What a network minimises."
from .lagrangian import ConsistencyLoss, LDCLoss, class_fractions, dual_step, kkt_residuals, lagrange_term, squared_norm
from .segmentation import BCEDice, CEDice
from .semantic_consistency import AuxiliaryLoss, auxiliary_loss, consistency_losses, image_consistency, modality_consistency, structured_losses

__all__ = ["AuxiliaryLoss", "BCEDice", "CEDice", "ConsistencyLoss", "LDCLoss", "auxiliary_loss", "class_fractions", "consistency_losses", "dual_step",
           "image_consistency", "kkt_residuals", "lagrange_term", "modality_consistency", "squared_norm", "structured_losses"]
