"What each paper adds: vector quantization, DisConX, hard attention, channel scaling, attention in windows."
from .channel_scaling import ChannelScaling, NetworkScaling, fold_scale, scale_channels
from .disconx import DisConX
from .hard_attention import HardAttention
from .vector_quantization import Quantized, VectorQuantizer
from .window_attention import WindowAttention, WindowBlock

__all__ = ["ChannelScaling", "DisConX", "HardAttention", "NetworkScaling", "Quantized", "VectorQuantizer", "WindowAttention", "WindowBlock",
           "fold_scale", "scale_channels"]
