"What each paper adds: vector quantization, DisConX, hard attention, external attention."
from .disconx import DisConX
from .external_attention import ExternalAttention, semantic_correlations
from .hard_attention import HardAttention
from .vector_quantization import Quantized, VectorQuantizer

__all__ = ["DisConX", "ExternalAttention", "HardAttention", "Quantized", "VectorQuantizer", "semantic_correlations"]
