"What each paper adds: vector quantization, DisConX, hard attention, optimal transport and its embedding."
from .disconx import DisConX
from .hard_attention import HardAttention
from .ot_embedding import L2GMapper, NystromFeatures, OTEmbedding
from .sinkhorn import marginal_error, sinkhorn
from .vector_quantization import Quantized, VectorQuantizer

__all__ = ["DisConX", "HardAttention", "L2GMapper", "NystromFeatures", "OTEmbedding", "Quantized", "VectorQuantizer", "marginal_error", "sinkhorn"]
