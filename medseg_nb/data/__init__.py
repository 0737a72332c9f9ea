"Volumes in mm, collections, phantoms, slices and patches."
from .collections import Case, Collection, check_collection, load_collection, png_pairs_to_collection, split_cases
from .phantoms import PHANTOM_KINDS, make_phantom
from .slices import Augment, PatchDataset, Preparation, SliceDataset, prepare_cases
from .volumes import back_to_grid, load_label, load_volume, resample, save_volume, to_canonical

__all__ = ["Augment", "Case", "Collection", "PHANTOM_KINDS", "PatchDataset", "Preparation", "SliceDataset", "back_to_grid", "check_collection",
           "load_collection", "load_label", "load_volume", "make_phantom", "png_pairs_to_collection", "prepare_cases", "resample", "save_volume",
           "split_cases", "to_canonical"]
