"Networks: encoder, a bottleneck in the slot, decoder."
from .cmaformer import CMAformer
from .cmaformer_peers import ResUNetPlusPlus, SwinUNETR, UNETR
from .encoder_decoder import EncoderDecoder, IdentityBottleneck, SegOutput, Slot
from .l2gnet import L2GBottleneck
from .lssc import LSSC2D, LSSC3D, OneModality, SETTINGS
from .nnformer import NNFormer
from .peers import ASPP, AttentionDecoder, AttentionGate, CascadedUpsampler, DeepLabDecoder, TransVQBottleneck, VQBottleneck, ViTBottleneck
from .swin_unet import SwinUNet
from .synergynet import SynergyBottleneck
from .zoo import build_model, list_models, list_settings, load_model, model_dims, save_model

__all__ = ["ASPP", "AttentionDecoder", "AttentionGate", "CMAformer", "CascadedUpsampler", "DeepLabDecoder", "EncoderDecoder", "IdentityBottleneck",
           "L2GBottleneck", "LSSC2D", "LSSC3D", "NNFormer", "OneModality", "ResUNetPlusPlus", "SETTINGS", "SegOutput", "Slot", "SwinUNETR", "SwinUNet", "SynergyBottleneck", "TransVQBottleneck", "UNETR", "VQBottleneck", "ViTBottleneck",
           "build_model", "list_models", "list_settings", "load_model", "model_dims", "save_model"]
