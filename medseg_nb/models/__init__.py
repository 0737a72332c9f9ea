"Networks: encoder, a bottleneck in the slot, decoder."
from .encoder_decoder import EncoderDecoder, IdentityBottleneck, SegOutput, Slot
from .nnformer import NNFormer
from .synergynet import SynergyBottleneck
from .zoo import build_model, list_models, load_model, save_model

__all__ = ["EncoderDecoder", "IdentityBottleneck", "NNFormer", "SegOutput", "Slot", "SynergyBottleneck", "build_model", "list_models", "load_model", "save_model"]
