"""semantic_correlations against eq. 9 to 11 of LSSC written as printed: time and peak memory, forward + backward.

    python benchmarks/external_attention.py             # under a minute on 2 cores
    python benchmarks/external_attention.py --rounds 21 --threads 1 --cpu-time

The printed form holds the Z x Z x N x n products B^ij and divides two sums. Compare the ratios, not the milliseconds.
"""
import measure
import torch

from medseg_nb.blocks.external_attention import semantic_correlations

SIZES = {"2D, scale 3: B12 Z5 N3 56x56": (12, 5, 3, 96, (56, 56)), "3D, scale 3: B2 Z5 N3 32x32x32": (2, 5, 3, 96, (32, 32, 32)),
         "2D, many classes: B12 Z14 N6 28x28": (12, 14, 6, 192, (28, 28))}


def as_printed(Q, A, W):
    "Eq. 9 to 11 with every array of the paper."
    K = torch.einsum("bzw,zwn->bzn", Q, W)
    A = A.flatten(3)                                             # (B,Z,N,n)
    S = torch.einsum("bih,bjhn->bijn", K, A)                     # (B,Z,Z,n)
    gate = S.softmax(2)
    B = A[:, None] * gate[:, :, :, None]                         # (B,Z,Z,N,n)
    return B.sum((3, 4)) / gate.sum(3)


ROWS = {"eq. 9 to 11 as printed": as_printed, "semantic_correlations": semantic_correlations}


def both_ways(f, inputs):
    "A row: one forward and backward pass."
    return lambda lap: torch.autograd.grad(f(*inputs).square().sum(), inputs)


def main():
    args = measure.arguments(__doc__, 9)
    for title, (B, Z, N, width, shape) in SIZES.items():
        inputs = [torch.randn(s, device=args.device, requires_grad=True) for s in ((B, Z, width), (B, Z, N, *shape), (Z, width, N))]
        torch.testing.assert_close(as_printed(*inputs), semantic_correlations(*inputs), rtol=1e-2, atol=1e-3)
        measure.compare(title, {name: both_ways(f, inputs) for name, f in ROWS.items()}, args, next(iter(ROWS)))


if __name__ == "__main__": main()
