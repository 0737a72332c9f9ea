"""The checks of lab 3. Each says what is wrong in words; reading them is allowed, but try first."""
from itertools import islice, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from marking import close, exercise, expect, in_words, wrong

from medseg_nb.blocks import semantic_correlations
from medseg_nb.losses import image_consistency, modality_consistency


class Rounds:
    "A stand-in for a loader: each batch says whose it is, of which round, and which of that round."
    def __init__(self, name, batches): self.name, self.batches, self.rounds = name, batches, 0
    def __len__(self): return self.batches
    def __iter__(self):
        self.rounds += 1
        return iter([(self.name, self.rounds, i) for i in range(1, self.batches + 1)])

@exercise(1, "the balanced batch")
def check_balanced(endless, balanced):
    "Five batches against two; then three modalities, the longest in the middle."
    first = endless(Rounds("mr", 2))
    if not hasattr(first, "__next__"): wrong("endless: it must be a generator; hand on the batches with `yield` or `yield from`.")
    found = list(islice(first, 5))
    if len(found) < 5: wrong(f"endless: it ends after {len(found)} batches of a loader of 2; when a round is over it must begin another (while True).")
    check_stream(found, "mr", 2, "endless")
    steps = ask_steps(balanced, {"ct": 5, "mr": 2})
    for m, n in (("ct", 5), ("mr", 2)): check_stream([step[m] for step in steps], m, n, f"balanced, {m}")
    steps = ask_steps(balanced, {"ct": 1, "mr": 3, "pet": 2})
    for m, n in (("ct", 1), ("mr", 3), ("pet", 2)): check_stream([step[m] for step in steps], m, n, f"three modalities, {m}")

def ask_steps(balanced, lengths):
    "What the student's generator gives, if it has the right form and length."
    found = balanced({m: Rounds(m, n) for m, n in lengths.items()})
    if found is None: wrong("balanced: your function returned nothing; hand on each step with `yield`.")
    steps, longest = list(islice(found, 40)), max(lengths.values())
    if len(steps) == 40: wrong("balanced: it does not end; an epoch has as many steps as the longest loader has batches.")
    if not all(isinstance(step, dict) for step in steps): wrong("balanced: each step must be a dict, {modality: batch}.")
    if len(steps) == sum(lengths.values()): wrong("balanced: as many steps as all loaders have batches together; each step takes a batch of every modality at once.")
    if len(steps) == min(lengths.values()): wrong("balanced: it stops with the shortest loader (as zip does); the rest of the larger modality is never seen.")
    if len(steps) != longest: wrong(f"balanced: {len(steps)} steps; the longest loader has {longest} batches.")
    if any(set(step) != set(lengths) for step in steps): wrong("balanced: each step must hold a batch of every modality.")
    return steps

def check_stream(found, name, n, what):
    "Whether the batches of one modality go round and round, each round asked for anew."
    if any(batch not in [(name, r, i) for r in range(1, 41) for i in range(1, n + 1)] for batch in found): wrong(f"{what}: these are not the batches of {name}'s loader, as they come.")
    right = [(name, k//n + 1, k % n + 1) for k in range(len(found))]
    if found == right: return
    if n > 1 and all(i == 1 for _, _, i in found): wrong(f"{what}: the loader is begun anew at every step, so only its first batch is ever seen; keep one stream.")
    if all(r == 1 for _, r, _ in found): wrong(f"{what}: the first round is repeated in the same order (itertools.cycle keeps its batches); ask the loader anew for each round, so that it shuffles anew.")
    wrong(f"{what}: not the batches in their order, round after round; found {found[:4]} ...")


def related(Q, A, W, axis=1, kernel="own", gate=None, scale=1.):
    "Numerator and denominator of eq. 11 with one possible mistake."
    K = torch.einsum("iw,wh->ih", Q, W[0]) if kernel == "first" else torch.einsum("iw,iwh->ih", Q, W)
    S = torch.einsum("jh,ihn->ijn" if kernel == "swapped" else "ih,jhn->ijn", K, A)*scale
    g = (S.softmax(axis) if gate is None else gate(S))
    B = A*g[:,:,None]                                                     # (Z,Z,N,n)
    return B.sum((2, 3)), g.sum(2)

@exercise(2, "reading E")
def check_correlations(correlations):
    "Three classes, two heads, five positions."
    Q, A, W = (torch.randn(*s, dtype=torch.double) for s in ((3, 4), (3, 2, 5), (3, 4, 2)))
    E, (total, _) = semantic_correlations(Q, A[None], W)[0], related(Q, A, W)
    mean = lambda **mistake: torch.div(*related(Q, A, W, **mistake))
    positions = {(3, 3, 5): "sum over the positions too.", (3, 3, 2): "sum over the heads too.", (3, 3, 2, 5): "sum over heads and positions.",
                 (1, 3, 3): "there is no batch here: one image.", (3,): "a number for each pair of classes."}
    expect(correlations(Q, A, W), E, "E", {
        "E: the denominator of eq. 11 is missing.": total,
        "E: the gate is a softmax over the positions; it runs over the classes j, at each position.": mean(axis=2),
        "E: the gate is a softmax over the classes i (who asks); it runs over the classes j (who answers).": mean(axis=0),
        "E: the softmax of the gate is missing.": mean(gate=lambda S: S), "E: there is no gate at all; weigh the maps with softmax(S).": mean(gate=torch.ones_like),
        "E: the gate is a sigmoid; the classes j must share each position (softmax).": mean(gate=torch.sigmoid),
        "E: you also divided by the number of heads; the denominator counts each position once.": E/2,
        "E: you divided by the number of positions, which is what the gates of all classes sum to; each pair i, j has the sum of its own gate.": total/5,
        "E: rows and columns are exchanged; row i is who asks.": E.mT,
        "E: all kernels were made with the W of the first class; each class has its own.": mean(kernel="first"),
        "E: in S the kernel belongs to class i and the maps to class j; you have it the other way round.": mean(kernel="swapped"),
        "E: eq. 9 divides by no root.": mean(scale=2**-.5),
    }, positions, tol=1e-8)
    expect(correlations(Q, A, W, divide=False), total, "divide=False", {
        "divide=False: this is E; only the numerator is asked for.": E, "divide=False: this is a mean over positions; the sum is asked for.": total/5}, positions, tol=1e-8)


@exercise(3, "between modalities")
def check_modality_level(modality_level, largest):
    "Three classes of four channels; then opposite ones."
    Q1, Q2 = torch.randn(2, 3, 4, dtype=torch.double)
    cosine, dots, lengths = F.cosine_similarity(Q1, Q2, dim=1), (Q1*Q2).sum(1), Q1.norm(dim=1)*Q2.norm(dim=1)
    unit = lambda Q: Q/Q.norm(dim=1, keepdim=True)
    expect(modality_level(Q1, Q2), modality_consistency([Q1, Q2]), "L_mcr", {
        "L_mcr: eq. 13 adds over the classes; you took the mean.": (1 - cosine).mean(),
        "L_mcr: the lengths are missing; divide each product by both.": (1 - dots).sum(),
        "L_mcr: divide by the lengths, not by their squares.": (1 - dots/lengths**2).sum(),
        "L_mcr: these are the cosines; 1 minus the cosine is asked for, so that alike is 0.": cosine.sum(),
        "L_mcr: the 1 belongs inside the sum, once a class.": 1 - cosine.sum(),
        "L_mcr: the cosine of absolute values calls opposite embeddings alike.": (1 - cosine.abs()).sum(),
        "L_mcr: you took one cosine of all embeddings together; each class has its own.": 1 - F.cosine_similarity(Q1.flatten(), Q2.flatten(), dim=0),
        "L_mcr: the cosines run over the classes; they run over the channels (the last axis).": (1 - F.cosine_similarity(Q1, Q2, dim=0)).sum(),
        "L_mcr: you compare each class with every class; class i of one modality meets class i of the other.": (1 - unit(Q1) @ unit(Q2).mT).sum(),
        "L_mcr: twice too large; |a - b|^2 of unit vectors is 2 - 2 cos.": (2 - 2*cosine).sum(),
    }, {(3,): "one number is asked for; add over the classes.", (3, 3): "class i meets class i; add over the classes."}, tol=1e-8)
    check_largest(largest(5))

def check_largest(found):
    "The largest value for five classes."
    if found is None: wrong("largest: your function returned nothing; is the `return` missing?")
    if found == 5: wrong("largest: 5 for 5 classes is what right angles give; a cosine can be smaller than 0.")
    if found in (1, 2): wrong("largest: that is for one class; eq. 13 adds over the classes.")
    if found != 10: wrong(f"largest: for 5 classes the largest value is 10 (every cosine -1), yours is {found}.")


def divergence(E1, E2, tau, axis=-1, one_way=False):
    "The bracket of eq. 14 for all pairs: (B1,B2,Z)."
    p, q = ((E/tau).log_softmax(axis) for E in (E1[:,None], E2[None]))
    return ((p.exp() if one_way else p.exp() - q.exp())*(p - q)).sum(-1)

@exercise(4, "between images")
def check_image_level(image_level, shrinks_by):
    "Two images of each modality, three classes; then batches of different size, and large entries."
    E1, E2 = 3*torch.randn(2, 2, 3, 3, dtype=torch.double)
    pairs = divergence(E1, E2, 4.).sum(-1)                                # (2,2)
    right, there = pairs.mean(), divergence(E1, E2, 4., one_way=True).sum(-1).mean()
    expect(image_level(E1, E2, 4.), right, "L_icr", {
        "L_icr: only one direction, KL(p||q); eq. 14 adds KL(q||p).": there, "L_icr: only one direction, KL(q||p); eq. 14 adds KL(p||q).": right - there,
        "L_icr: eq. 14 adds both directions; you took their mean.": right/2, "L_icr: the sign is the wrong way round; a divergence is never negative.": -right,
        "L_icr: tau is missing.": divergence(E1, E2, 1.).sum(-1).mean(), "L_icr: divide by tau, do not multiply.": divergence(E1, E2, .25).sum(-1).mean(),
        "L_icr: the softmax runs down the columns (over i); each row is a distribution (over j).": divergence(E1, E2, 4., axis=-2).sum(-1).mean(),
        "L_icr: you averaged over the classes; eq. 14 adds over them.": right/3,
        "L_icr: you added over the pairs of images; take their mean, so that the loss does not grow with the batch.": pairs.sum(),
        "L_icr: you only compare image 1 with image 1 and 2 with 2; every image of one modality meets every image of the other (E1[:,None], E2[None]).": pairs.diagonal().mean(),
        "L_icr: you averaged E over the images first; compare every pair of images, then average.": divergence(E1.mean(0, True), E2.mean(0, True), 4.).sum(),
        "L_icr: eq. 14 has no factor tau^2 (distillation has it).": 16*right,
    }, {(2, 2): "these are the pairs; take their mean.", (2, 2, 3): "add over the classes, take the mean over the pairs.", (2,): "one number is asked for."}, tol=1e-8)
    E3 = torch.randn(3, 3, 3, dtype=torch.double)
    expect(image_level(E1, E3, 4.), image_consistency([E1, E3]), "two images against three", tol=1e-8)
    expect(image_level(400*E1, 400*E2, 1.), image_consistency([400*E1, 400*E2], 1.), "entries in the hundreds (log_softmax never takes a log of 0)", tol=1e-6)
    check_shrinks(float(shrinks_by))

def check_shrinks(found):
    "By how much a doubled tau divides the gradient, where tau is large: measured."
    E1, E2 = (torch.randn(1, 3, 3, dtype=torch.double, requires_grad=True) for _ in range(2))
    slope = lambda tau: torch.autograd.grad(image_consistency([E1, E2], tau), E1)[0].norm()
    true = (slope(1e3)/slope(2e3)).item()
    if found <= 0: wrong("shrinks_by: a factor above 1 is asked for; by how much is the gradient divided?")
    if abs(found*true - 1) < .1: wrong("shrinks_by: by how much is it *divided*? A number above 1.")
    if abs(found - 2) < .1: wrong("shrinks_by: p - q shrinks like 1/tau, and so does ln p - ln q: the loss is their product.")
    if abs(found - true) > .1: wrong(f"shrinks_by: measured at tau = 1000 and 2000 the factor is {true:.2f}, yours is {found:g}.")


class Output(NamedTuple):
    "What a model gives for a modality."
    logits:torch.Tensor
    losses:dict
    maps:dict

def made_up(B):
    "A modality's output and labels: B images, three classes, two scales."
    maps = {"Q": torch.randn(3, 6), "E_1": torch.randn(B, 3, 3), "E_2": torch.randn(B, 3, 3), "aux_1": torch.randn(B, 3, 4, 4), "aux_2": torch.randn(B, 3, 4, 4)}
    return Output(torch.randn(B, 3, 4, 4), {}, maps), torch.randint(0, 3, (B, 4, 4))

@exercise(5, "the total")
def check_total(total_loss):
    "Simple stand-ins take the places of the four losses."
    (ct, y_ct), (mr, y_mr) = made_up(2), made_up(2)
    judge = lambda logits, y: (logits*(y[:,None] + 1)).square().mean()
    judges = judge, lambda maps, y: judge(maps["aux_1"], y) + 3*judge(maps["aux_2"], y), lambda a, b: (a - 2*b).square().mean(), lambda a, b: (a - 3*b).square().mean()
    seg = [judge(ct.logits, y_ct), judge(mr.logits, y_mr)]
    aux = [judges[1](ct.maps, y_ct), judges[1](mr.maps, y_mr)]
    mcr, icr = judges[2](ct.maps["Q"], mr.maps["Q"]), [judges[3](ct.maps[n], mr.maps[n]) for n in ("E_1", "E_2")]
    total = lambda a=.7, b=.3, c=.2, seg=seg, aux=aux, mcr=mcr, icr=icr: sum(seg) + a*sum(aux) + b*mcr + c*sum(icr)
    expect(total_loss({"mr": mr}, {"mr": y_mr}, *judges, (.7, .3, .2)), seg[1] + .7*aux[1], "one modality alone", {
        "one modality alone: L_aux is missing, or has no weight alpha.": seg[1] + aux[1], "one modality alone: L_aux is missing.": seg[1]}, tol=1e-5)
    swapped = [judge(ct.logits, y_mr), judge(mr.logits, y_ct)]
    expect(total_loss({"ct": ct, "mr": mr}, {"ct": y_ct, "mr": y_mr}, *judges, (.7, .3, .2)), total(), "the total", {
        "the total: the weights are missing.": total(1, 1, 1), "the total: your weights are 0.5 whatever is asked for; use alpha, beta and gamma.": total(.5, .5, .5),
        "the total: alpha weighs the segmentation too; L_seg has no weight.": total() - .3*sum(seg),
        "the total: L_seg is averaged over the modalities; eq. 15 adds.": total(seg=[sum(seg)/2]), "the total: L_aux is averaged over the modalities; eq. 15 adds.": total(aux=[sum(aux)/2]),
        "the total: L_seg and L_aux are averaged over the modalities; eq. 15 adds.": total(seg=[sum(seg)/2], aux=[sum(aux)/2]),
        "the total: L_seg is missing.": total(seg=[]), "the total: L_aux is missing.": total(aux=[]), "the total: L_mcr is missing.": total(b=0), "the total: L_icr is missing.": total(c=0),
        "the total: only the first scale is in L_icr; eq. 14 adds over the scales.": total(icr=icr[:1]), "the total: L_icr is averaged over the scales; eq. 14 adds.": total(icr=[sum(icr)/2]),
        "the total: only one modality is in L_seg.": total(seg=seg[:1]), "the total: only one modality is in L_seg. ": total(seg=seg[1:]),
        "the total: only one modality is in L_aux.": total(aux=aux[:1]), "the total: only one modality is in L_aux. ": total(aux=aux[1:]),
        "the total: logits meet the labels of the other modality.": total(seg=swapped), "the total: maps meet the labels of the other modality.":
            total(aux=[judges[1](ct.maps, y_mr), judges[1](mr.maps, y_ct)]),
        "the total: logits and maps meet the labels of the other modality.": total(seg=swapped, aux=[judges[1](ct.maps, y_mr), judges[1](mr.maps, y_ct)]),
        "the total: beta and gamma are exchanged.": total(b=.2, c=.3),
        "the total: L_icr compares a modality with itself.": total(icr=[judges[3](ct.maps[n], ct.maps[n]) for n in ("E_1", "E_2")]),
        "the total: L_mcr compares a modality with itself.": total(mcr=judges[2](ct.maps["Q"], ct.maps["Q"])),
    }, tol=1e-5)


@exercise(6, "scale and fold")
def check_scale(scale_vector, fold):
    "Three classes of width 4; a square layer, then one that is not."
    Q, w1, W = (torch.randn(*s, dtype=torch.double) for s in ((3, 4), (3,), (4, 5)))
    phi = w1 @ Q @ W
    expect(scale_vector(Q, w1, W), 1 + phi, "phi", {
        "phi: the 1 is missing; with W = 0 the block must stay as it was.": phi, "phi: w1 is missing; it weighs the classes.": 1 + Q.sum(0) @ W,
        "phi: you took the mean over the classes; w1 weighs them.": 1 + Q.mean(0) @ W, "phi: no sign is turned round in eq. 1.": 1 - phi},
        {(3, 5): "weigh the classes with w1 and add them up: one vector a modality.", (4,): "that is Omega; it still needs W.", (1, 5): "a vector (D,)."}, tol=1e-8)
    for o, i in ((4, 4), (5, 3)): check_fold(fold, torch.randn(o, i, dtype=torch.double), torch.randn(o, dtype=torch.double), torch.randn(o, dtype=torch.double))

def check_fold(fold, weight, bias, phi):
    "A layer whose output was scaled, as one layer."
    found = fold(weight.clone(), bias.clone(), phi)
    if not isinstance(found, tuple) or len(found) != 2: wrong("fold: return two tensors, the weight and the bias.")
    rows = phi[:,None]
    mistakes = {"fold, the weight: it came back unscaled.": weight, "fold, the weight: multiply, do not divide.": weight/rows, "fold, the weight: scaled twice.": weight*rows**2}
    if weight.shape[0] == weight.shape[1]: mistakes |= {"fold, the weight: phi scales what comes out (the rows of the weight), not what goes in (its columns).": weight*phi}
    expect(found[0], weight*rows, "fold, the weight", mistakes, tol=1e-8)
    expect(found[1], bias*phi, "fold, the bias", {"fold, the bias: it came back unscaled, but phi (W x + b) holds phi b.": bias, "fold, the bias: multiply, do not divide.": bias/phi}, tol=1e-8)


def shares(differences, far=lambda means, seen: means.abs() >= seen.abs() - 1e-9):
    "The share of sign patterns that `far` picks."
    signs = torch.tensor(list(product((-1., 1.), repeat=len(differences)))).to(differences)
    return far((signs*differences).mean(1), differences.mean()).double().mean()

@exercise(7, "is it a difference?")
def check_sign_flips(sign_flips, smallest_share):
    "Five patients, one of whom got worse."
    d = torch.tensor([3., -1, 4, 2, 1], dtype=torch.double)/64
    right = shares(d)
    expect(sign_flips(d), right, "the share", {
        "the share: only one side; as far from 0 in the other direction counts too (abs).": shares(d, lambda m, s: m >= s - 1e-9),
        "the share: at least as far; the signs that were seen count themselves.": shares(d, lambda m, s: m.abs() > s.abs() + 1e-9),
        "the share: you counted the ways that are no farther from 0 than yours.": shares(d, lambda m, s: m.abs() <= s.abs() + 1e-9),
        "the share: you counted the ways that are nearer to 0 than yours.": shares(d, lambda m, s: m.abs() < s.abs() - 1e-9),
        "the share: this is a number of ways; divide by how many there are.": right*32,
        "the share: absolute values come after the mean; before it every way is the same.": torch.tensor(1.).double(),
        "the share: a mean (divide by n) meets a sum.": shares(d, lambda m, s: m.abs() >= 5*s.abs() - 1e-9), "the share: a sum meets a mean (divide by n).": shares(d, lambda m, s: 5*m.abs() >= s.abs() - 1e-9),
    }, {(32,): "one number is asked for: the share of the ways."}, tol=1e-6)
    if not close(torch.tensor(float(sign_flips(-d))).double(), right, 1e-6): wrong("right where the mean is above 0; where it is below, you count the wrong side (abs of the mean that was seen).")
    check_smallest(smallest_share)

def check_smallest(smallest_share):
    "What n patients can show at best."
    found = smallest_share(5)
    if found is None: wrong("smallest_share: your function returned nothing; is the `return` missing?")
    if found == 0: wrong("smallest_share: never 0; the signs that were seen count themselves.")
    if abs(found - 1/32) < 1e-9: wrong("smallest_share: all plus reaches as far as all minus: two ways of 2^n.")
    if abs(found - 1/16) > 1e-9: wrong(f"smallest_share: for 5 patients, all better, 2 of 32 ways reach as far: 0.0625; yours is {found:g}.")


@exercise(8, "in words")
def check_answer(text):
    "Long enough to be an answer; whether it is a good one, a person says."
    in_words(text, at_least=30)
