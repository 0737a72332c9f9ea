"What each paper adds: vector quantization, DisConX, hard attention, optimal transport."
from .channel_scaling import ChannelScaling, NetworkScaling, fold_scale, scale_channels
from .channel_spatial_attention import AdditiveGate, ChannelAttention, CrossAttention, QueryNormBlock, RelativeAttention, SpatialAttention
from .disconx import DisConX
from .external_attention import AuxiliaryHead, ExternalAttention, semantic_correlations
from .hard_attention import HardAttention
from .ot_embedding import L2GMapper, NystromFeatures, OTEmbedding
from .sinkhorn import marginal_error, sinkhorn
from .vector_quantization import Quantized, VectorQuantizer
from .window_attention import WindowAttention, WindowBlock, WindowStage

__all__ = ["AdditiveGate", "AuxiliaryHead", "ChannelAttention", "ChannelScaling", "CrossAttention", "DisConX", "ExternalAttention", "HardAttention", "L2GMapper", "NetworkScaling", "NystromFeatures", "OTEmbedding",
           "Quantized", "QueryNormBlock", "RelativeAttention", "SpatialAttention", "VectorQuantizer", "WindowAttention", "WindowBlock", "WindowStage", "fold_scale", "marginal_error", "scale_channels",
           "semantic_correlations", "sinkhorn"]
