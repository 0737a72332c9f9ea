"What each paper adds: vector quantization, DisConX, hard attention, optimal transport."
from .disconx import DisConX
from .hard_attention import HardAttention
from .sinkhorn import marginal_error, sinkhorn
from .vector_quantization import Quantized, VectorQuantizer

__all__ = ["DisConX", "HardAttention", "Quantized", "VectorQuantizer", "marginal_error", "sinkhorn"]
