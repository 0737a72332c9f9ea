"What each paper adds: vector quantization, DisConX, hard attention, attention in windows."
from .disconx import DisConX
from .hard_attention import HardAttention
from .vector_quantization import Quantized, VectorQuantizer
from .window_attention import WindowAttention, WindowBlock

__all__ = ["DisConX", "HardAttention", "Quantized", "VectorQuantizer", "WindowAttention", "WindowBlock"]
