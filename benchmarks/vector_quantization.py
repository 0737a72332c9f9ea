"""Forward + backward of VectorQuantizer against a plain version and vector-quantize-pytorch: time and peak memory.

    python benchmarks/vector_quantization.py              # about two minutes on 2 cores
    python benchmarks/vector_quantization.py --rounds 21 --threads 1

Compare the ratios, not the milliseconds. Memory is counted beyond the inputs and weights that were there before.
"""
import measure
import torch
import torch.nn.functional as F
from torch import nn

from medseg_nb.blocks.vector_quantization import VectorQuantizer

SIZES = {"B8 n196 d512 K1024": (8, 14, 512, 1024), "B8 n3136 d256 K512": (8, 56, 256, 512),
         "B8 n16384 d256 K1024": (8, 128, 256, 1024)}
OURS, PLAIN, PEER, PEER_EMA = ("VectorQuantizer", "plain, 15 lines", "vector-quantize-pytorch, learnable codebook",
                               "vector-quantize-pytorch, default (EMA, rotation)")
OURS_EMA = "VectorQuantizer, EMA"


class Plain(nn.Module):
    "What most people write: tokens in rows, arg-min by addmm, two stop-gradient terms, straight-through."
    def __init__(self, dim, codebook_size, beta=1.0):
        super().__init__()
        self.codebook, self.beta = nn.Parameter(torch.randn(codebook_size, dim)), beta
    def forward(self, z):
        tokens = z.flatten(2).transpose(1, 2)                                          # (B,n,C)
        flat = tokens.reshape(-1, z.shape[1])                                          # (N,C)
        distance = torch.addmm(self.codebook.square().sum(1), flat, self.codebook.T, alpha=-2)
        codes = distance.argmin(1).view(tokens.shape[:2])                              # (B,n)
        chosen = F.embedding(codes, self.codebook)                                     # (B,n,C)
        loss = F.mse_loss(chosen, tokens.detach()) + self.beta*F.mse_loss(tokens, chosen.detach())
        out = tokens + (chosen - tokens).detach()
        return out.transpose(1, 2).reshape(z.shape), codes.view(z.shape[0], *z.shape[2:]), loss


def build(name, dim, codebook_size):
    "One of the versions by name."
    if name == PLAIN: return Plain(dim, codebook_size)
    if name == OURS: return VectorQuantizer(dim, codebook_size)
    if name == OURS_EMA: return VectorQuantizer(dim, codebook_size, ema_decay=0.8)
    from vector_quantize_pytorch import VectorQuantize
    if name == PEER_EMA: return VectorQuantize(dim, codebook_size, accept_image_fmap=True)
    return VectorQuantize(dim, codebook_size, accept_image_fmap=True, learnable_codebook=True, ema_update=False,
                          rotation_trick=False, straight_through=False)


def step(module, z, weight):
    "A row: one forward and backward pass; the gradient of the output is `weight`."
    def row(lap):
        z.grad = None
        for p in module.parameters(): p.grad = None
        out = module(z)
        torch.autograd.backward([out[0], out[2].sum()], [weight, None])
    return row


def inputs(size, device):
    "Tokens that need a gradient, and the gradient of the output."
    B, side, dim, _ = size
    torch.manual_seed(0)
    z, weight = torch.randn(2, B, dim, side, side, device=device)
    return z.requires_grad_(), weight


def peak(name, size, device):
    "MiB of tensors alive at once during a step, above what was there before it (inputs and weights)."
    module, (z, weight) = build(name, size[2], size[3]).to(device), inputs(size, device)
    step(module, *inputs((1, 4, *size[2:]), device))(None)   # libraries take their buffers
    for p in module.parameters(): p.grad = None
    return measure.peak(step(module, z, weight), device)


def compare(title, names, size, args):
    "Print one size: time, its ratio to the plain version, memory, its ratio."
    z, weight = inputs(size, args.device)
    rows = {name: step(build(name, size[2], size[3]).to(args.device), z, weight) for name in names}
    seconds = measure.compare(title, rows, args, PLAIN, mib={name: peak(name, size, args.device) for name in names})
    if PEER in names: print(f"vector-quantize-pytorch takes {measure.ratios(seconds, OURS)[PEER]:.2f} times as long as VectorQuantizer")


def main():
    args = measure.arguments(__doc__, 9, size=dict(choices=list(SIZES), help="one size only"))
    for title, size in SIZES.items():
        if args.size not in (None, title): continue
        large = size[1] > 100
        compare(title, [OURS, PLAIN] + ([] if large else [OURS_EMA, PEER, PEER_EMA]), size, args)


if __name__ == "__main__": main()
