"What each paper adds: vector quantization, DisConX, hard attention, the optimal-transport embedding."
from .disconx import DisConX
from .hard_attention import HardAttention
from .ot_embedding import L2GMapper, NystromFeatures, OTEmbedding
from .vector_quantization import Quantized, VectorQuantizer

__all__ = ["DisConX", "HardAttention", "L2GMapper", "NystromFeatures", "OTEmbedding", "Quantized", "VectorQuantizer"]
