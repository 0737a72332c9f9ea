"""Solutions of lab 3. Each part below is the whole of one exercise's cell."""
from itertools import product

import torch

# %%
# Exercise 1: the balanced batch
def endless(loader):
    "Batch after batch, for ever; each round asks the loader anew, so that it shuffles anew."
    while True: yield from loader

def balanced(loaders):
    "{modality: loader} -> one epoch of {modality: batch}: as many steps as the longest loader has batches."
    steps = max(len(loader) for loader in loaders.values())
    streams = {m: endless(loader) for m, loader in loaders.items()}
    for _ in range(steps): yield {m: next(stream) for m, stream in streams.items()}

# %%
# Exercise 2: reading E
def correlations(Q, A, W, divide=True):
    "Q (Z,w), A (Z,N,n), W (Z,w,N) -> E (Z,Z), eq. 9 to 11 for one image; divide=False: its numerator alone."
    K = torch.einsum("iw,iwh->ih", Q, W)                       # (Z,N) a kernel of each class
    S = torch.einsum("ih,jhn->ijn", K, A)                      # (Z,Z,n) eq. 9
    gate = S.softmax(1)                                        # (Z,Z,n) over the classes j
    B = A*gate[:,:,None]                                       # (Z,Z,N,n) eq. 10
    total = B.sum((2, 3))                                      # (Z,Z)
    return total/gate.sum(2) if divide else total              # eq. 11

# %%
# Exercise 3: between modalities
def modality_level(Q1, Q2):
    "Q1, Q2 (Z,w), the class embeddings of two modalities -> a number, eq. 13."
    cosine = (Q1*Q2).sum(1)/(Q1.norm(dim=1)*Q2.norm(dim=1))    # (Z,)
    return (1 - cosine).sum()

def largest(Z):
    "The largest value that eq. 13 can take for Z classes."
    return 2*Z

# %%
# Exercise 4: between images
def image_level(E1, E2, tau=4.):
    "E1 (B1,Z,Z), E2 (B2,Z,Z) -> a number: eq. 14 at one scale, mean over all pairs of an image of each."
    log_p, log_q = ((E/tau).log_softmax(-1) for E in (E1[:,None], E2[None]))   # (B1,1,Z,Z), (1,B2,Z,Z)
    both_ways = ((log_p.exp() - log_q.exp())*(log_p - log_q)).sum(-1)          # (B1,B2,Z) KL(p||q) + KL(q||p)
    return both_ways.sum(-1).mean()

shrinks_by = 4   # where tau is large: by what a doubled tau divides the gradient of eq. 14

# %%
# Exercise 5: the total
def total_loss(outputs, labels, segment, auxiliary, modality_level, image_level, weights=(.5, .5, .5)):
    "{modality: output}, {modality: labels} -> a number, eq. 15; one modality has nobody to be compared with."
    alpha, beta, gamma = weights
    L_seg = sum(segment(out.logits, labels[m]) for m, out in outputs.items())
    L_aux = sum(auxiliary(out.maps, labels[m]) for m, out in outputs.items())
    if len(outputs) == 1: return L_seg + alpha*L_aux
    one, two = (out.maps for out in outputs.values())
    L_mcr = modality_level(one["Q"], two["Q"])
    L_icr = sum(image_level(one[name], two[name]) for name in one if name.startswith("E_"))
    return L_seg + alpha*L_aux + beta*L_mcr + gamma*L_icr

# %%
# Exercise 6: scale and fold
def scale_vector(Q, w1, W):
    "Q (Z,w), w1 (Z,), W (w,D) -> phi (D,): eq. 1, plus 1, so that W = 0 leaves the block as it is."
    return 1 + w1 @ Q @ W

def fold(weight, bias, phi):
    "weight (D,i), bias (D,), phi (D,) -> weight and bias of the layer whose output is phi times the old one's."
    return phi[:,None]*weight, phi*bias

# %%
# Exercise 7: is it a difference?
def sign_flips(differences):
    "(n,) differences, one a patient -> the share of the 2^n ways to choose their signs whose mean is at least as far from 0."
    signs = torch.tensor(list(product((-1., 1.), repeat=len(differences)))).to(differences)   # (2^n,n)
    means = (signs*differences).mean(1)                                                       # (2^n,)
    return (means.abs() >= differences.mean().abs() - 1e-9).double().mean()                   # 1e-9 for rounding

def smallest_share(n):
    "The smallest share that n patients can give, however large the differences are."
    return 2/2**n

# %%
# Exercise 8: in words (only the length is checked)
answer = """
With the first seed all five unseen MR patients gain from the CTs, the smallest share that five patients can give; with the second seed the gain is gone. So the start of the training moves the Dice as much as the CTs do, and the
coin over patients could not know. The two consistency terms fall as they should, and change the Dice by a hundredth or two, within what a seed does. Ten MR patients clearly help the two whose contrast the one MR does not show,
and not the others, as the same number of steps is spread over ten contrasts. Nothing is decided here; next: five seeds of each, several draws of the one MR patient, and more unseen patients.
"""
