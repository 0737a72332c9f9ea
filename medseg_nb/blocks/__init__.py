"What each paper adds: vector quantization, DisConX, hard attention."
from .disconx import DisConX
from .hard_attention import HardAttention
from .vector_quantization import Quantized, VectorQuantizer

__all__ = ["DisConX", "HardAttention", "Quantized", "VectorQuantizer"]
