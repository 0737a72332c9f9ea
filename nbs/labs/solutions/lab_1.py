"""Solutions of lab 1. Each part below is the whole of one exercise's cell."""
import torch
import torch.nn.functional as F

# %%
# Exercise 1: the nearest code
def nearest_code(z, codebook):
    "z (B,C,h,w), codebook (K,C) -> codes (B,h,w), whole numbers; the lowest index of equals."
    B, C, h, w = z.shape
    tokens = z.movedim(1, -1).reshape(-1, C)                        # (B,C,h,w) -> (B,h,w,C) -> (B*h*w,C)
    distance = (tokens[:,None] - codebook).square().sum(-1)         # (B*h*w,K) squared distances
    return distance.argmin(1).view(B, h, w)                         # (B*h*w,) -> (B,h,w)

# %%
# Exercise 2: straight through
def straight_through(z, z_q):
    "z, z_q of one shape -> the value of z_q, with the gradient handed to z."
    return z + (z_q - z).detach()

# %%
# Exercise 3: the loss and its gradient
def quantization_loss(z, e, beta):
    "z, e (B,C,h,w): tokens and the codes they took -> a number, means of squares."
    codebook_term = (z.detach() - e).square().mean()
    commitment_term = (z - e.detach()).square().mean()
    return codebook_term + beta*commitment_term

def loss_gradient(z, e, beta):
    "The gradients of L_quant on paper: that of z, and that of e."
    return 2*beta*(z - e)/z.numel(), 2*(e - z)/z.numel()

# %%
# Exercise 4: perplexity, and a cure
def perplexity(codes, K):
    "codes (any shape), whole numbers below K -> a number from 1 to K."
    p = torch.bincount(codes.flatten(), minlength=K)/codes.numel()  # (K,) shares
    return torch.special.entr(p).sum().exp()

@torch.no_grad()
def restart_dead(codebook, tokens, codes):
    "codebook (K,C), tokens (N,C), codes (N,): move each code that no token took onto a token drawn at random."
    dead = torch.bincount(codes.flatten(), minlength=len(codebook)) == 0                     # (K,) True where nobody came
    drawn = tokens[torch.randint(len(tokens), (int(dead.sum()),), device=tokens.device)]     # one token a dead code
    codebook[dead] = drawn
    return codebook

# %%
# Exercise 5: DisConX
def cross_attention(z_dis, z_con, Wq, Wk, Wv, heads):
    "z_dis, z_con (B,n,C), matrices (C,C) applied as x @ W -> (B,n,C), heads side by side (eq. 2-3, 5)."
    q, k, v = z_dis @ Wq, z_con @ Wk, z_con @ Wv                                             # (B,n,C) each
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))              # (B,heads,n,d)
    weights = (q @ k.mT/q.shape[-1]**.5).softmax(-1)                                         # (B,heads,n,n)
    return (weights @ v).transpose(1, 2).flatten(2)                                          # (B,n,heads,d) -> (B,n,C)

# %%
# Exercise 6: hard attention
def hard_weights(scores):
    "scores (...,n,n), a row a query -> weights: forwards the indicator of eq. 6, backwards the softmax of each row."
    soft = scores.softmax(-1)
    hard = F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)
    return hard + soft - soft.detach()

# %%
# Exercise 7: three bottlenecks
def features(kind, z_con, quantize, disconx, refine):
    "z_con (B,C,h,w) -> what the decoder gets for a kind of bottleneck, and the quantization loss."
    if kind == "continuous": return z_con, 0.
    z_dis, loss = quantize(z_con)
    if kind == "discrete": return z_dis, loss
    z_f = z_dis + z_con + disconx(z_dis, z_con)
    return z_f + refine(z_f), loss

# %%
# Exercise 8: in words (only the length is checked)
answer = """
The discrete map has few different tokens: inside an organ it is flat, which suppresses noise and suits large structures, but a thin wall falls between
two codes and is lost. The continuous map keeps the wall and the noise. The synergy adds what each knows, at the price of parameters and of time; with one
seed and a short run a difference of a few hundredths of Dice says little, so several seeds and patients are needed before one believes it.
"""
