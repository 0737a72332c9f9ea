"What each paper adds: vector quantization, DisConX, hard attention, optimal transport."
from .disconx import DisConX
from .external_attention import ExternalAttention, semantic_correlations
from .hard_attention import HardAttention
from .ot_embedding import L2GMapper, NystromFeatures, OTEmbedding
from .sinkhorn import marginal_error, sinkhorn
from .vector_quantization import Quantized, VectorQuantizer

__all__ = ["DisConX", "ExternalAttention", "HardAttention", "L2GMapper", "NystromFeatures", "OTEmbedding", "Quantized", "VectorQuantizer",
           "marginal_error", "semantic_correlations", "sinkhorn"]
