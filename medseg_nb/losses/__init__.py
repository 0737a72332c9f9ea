"What a network minimises."
from .boundary_contrast import BoundaryContrast, SDMHead, SDMProjection, draw_negatives, info_nce, signed_distance_map
from .lagrangian import ConsistencyLoss, LDCLoss, class_fractions, dual_step, kkt_residuals, lagrange_term, squared_norm
from .segmentation import BCEDice, CEDice, sum_over_processes
from .semantic_consistency import AuxiliaryLoss, auxiliary_loss, consistency_losses, image_consistency, modality_consistency, structured_losses

__all__ = ["AuxiliaryLoss", "BCEDice", "BoundaryContrast", "CEDice", "ConsistencyLoss", "LDCLoss", "SDMHead", "SDMProjection", "auxiliary_loss",
           "class_fractions", "consistency_losses", "draw_negatives", "dual_step", "image_consistency", "info_nce", "kkt_residuals", "lagrange_term",
           "modality_consistency", "signed_distance_map", "squared_norm", "structured_losses", "sum_over_processes"]
