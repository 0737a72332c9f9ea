"Networks: encoder, a bottleneck in the slot, decoder."
from .encoder_decoder import EncoderDecoder, IdentityBottleneck, SegOutput, Slot
from .l2gnet import L2GBottleneck
from .synergynet import SynergyBottleneck
from .zoo import build_model, list_models, load_model, save_model

__all__ = ["EncoderDecoder", "IdentityBottleneck", "L2GBottleneck", "SegOutput", "Slot", "SynergyBottleneck",
           "build_model", "list_models", "load_model", "save_model"]
