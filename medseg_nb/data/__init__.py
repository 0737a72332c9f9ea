"Volumes in mm, collections, phantoms, slices and patches, several modalities, public collections."
from .collections import Case, Collection, check_collection, labelled_cases, load_collection, png_pairs_to_collection, split_cases
from .heads import HEAD, HEAD_CT, HEAD_MR, draw_head, paint_head
from .lesion_pictures import draw_skin, skin_colour
from .liver_tumours import LIVER_TUMOUR, draw_liver_tumours
from .modalities import MultiModal, PREPARATIONS, few_shot, list_cases, load_modalities, remap_collection, split_modalities
from .official_layouts import REPLICAS, TUMOURS, write_replica
from .phantoms import PHANTOM_KINDS, make_phantom
from .public_collections import COLLECTIONS, check_layout, describe_collection, list_collections, prepare_collection
from .slices import Augment, PatchDataset, Preparation, SliceDataset, prepare_cases
from .volumes import back_to_grid, load_label, load_volume, resample, save_volume, to_canonical

__all__ = ["Augment", "COLLECTIONS", "Case", "Collection", "HEAD", "HEAD_CT", "HEAD_MR", "LIVER_TUMOUR", "MultiModal", "PHANTOM_KINDS",
           "PREPARATIONS", "PatchDataset", "Preparation", "REPLICAS", "SliceDataset", "TUMOURS", "back_to_grid", "check_collection",
           "check_layout", "describe_collection", "draw_head", "draw_liver_tumours", "draw_skin", "few_shot", "labelled_cases",
           "list_cases", "list_collections", "load_collection", "load_label", "load_modalities", "load_volume", "make_phantom",
           "paint_head", "png_pairs_to_collection", "prepare_cases", "prepare_collection", "remap_collection", "resample", "save_volume",
           "skin_colour", "split_cases", "split_modalities", "to_canonical", "write_replica"]
