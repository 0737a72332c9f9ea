"What a network minimises."
from .segmentation import BCEDice, CEDice

__all__ = ["BCEDice", "CEDice"]
