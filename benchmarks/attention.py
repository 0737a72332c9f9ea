"""DisConX and HardAttention against plain attention: time and peak memory, forward and forward + backward.

    python benchmarks/attention.py              # two or three minutes on 2 cores
    python benchmarks/attention.py --rounds 21 --threads 1 --cpu-time

Rows work on queries, keys and values (B, heads, n, d) that are already projected, so that they differ in the
attention alone; the last table compares whole modules. Compare the ratios, not the milliseconds.
"""
import measure
import torch
import torch.nn.functional as F
from torch import nn

from medseg_nb.blocks.disconx import DisConX
from medseg_nb.blocks.hard_attention import HardAttention, StraightThroughPick, find_winners

DENSE, OURS = "one-hot straight-through", "HardAttention, straight-through"
SIZES = {"B8 n196 d512 h2": (8, 196, 512, 2), "B8 n196 d512 h8": (8, 196, 512, 8),
         "B1 n3136 d256 h8": (1, 3136, 256, 8)}


def naive(q, k, v):
    "Soft attention with the n x n weights built."
    return (q @ k.mT * q.shape[-1]**-0.5).softmax(-1) @ v


def gather(q, k, v):
    "Arg-max and gather: no gradient to q and k."
    return v.gather(2, (q @ k.mT).argmax(-1, keepdim=True).expand_as(v))


def dense(q, k, v):
    "Hard weights forward, soft weights backward, as n x n matrices."
    s = q @ k.mT * q.shape[-1]**-0.5
    soft = s.softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, s.argmax(-1, keepdim=True), 1.)
    return (hard + soft - soft.detach()) @ v


def ours(q, k, v):
    "What HardAttention computes between its projections."
    q, k, x = (t.flatten(0, 1) for t in (q * q.shape[-1]**-0.5, k, v))   # (B,heads,n,d) -> (G,n,d)
    with torch.no_grad(): winners = find_winners(q, k, False)
    return StraightThroughPick.apply(q, k, x, winners, False).view_as(v)


ATTENTION = {"F.scaled_dot_product_attention (DisConX)": F.scaled_dot_product_attention, "naive softmax": naive,
             "arg-max + gather": gather, DENSE: dense, OURS: ours}


class Peer(nn.MultiheadAttention):
    "nn.MultiheadAttention on maps (B,C,*S)."
    def forward(self, z_dis, z_con):
        q, kv = z_dis.flatten(2).mT, z_con.flatten(2).mT
        return super().forward(q, kv, kv, need_weights=False)[0].mT.reshape(z_dis.shape)


def modules(dim, heads):
    "Whole modules with their projections."
    return {"nn.MultiheadAttention": Peer(dim, heads, bias=False, batch_first=True), "DisConX": DisConX(dim, heads),
            "HardAttention": HardAttention(dim, heads),
            "HardAttention, estimator none": HardAttention(dim, heads, estimator="none")}


def main():
    args = measure.arguments(__doc__, 9)
    for title, (b, n, d, h) in SIZES.items():
        qkv = [torch.randn(b, h, n, d//h, device=args.device, requires_grad=True) for _ in range(3)]
        rows = {name: measure.both_ways(f, qkv) for name, f in ATTENTION.items()}
        measure.compare(title, rows, args, DENSE, max(3, args.rounds//3) if n > 1000 else args.rounds)
    maps = [torch.randn(8, 512, 14, 14, device=args.device, requires_grad=True) for _ in range(2)]
    rows = {name: measure.both_ways(block.to(args.device), maps[:1] if "Hard" in name else maps) for name, block in modules(512, 8).items()}
    measure.compare("whole modules, B8 512 x 14 x 14, h8", rows, args, "nn.MultiheadAttention")


if __name__ == "__main__": main()
