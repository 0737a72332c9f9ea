"""The checks of lab 1. Each says what is wrong in words; reading them is allowed, but try first."""
import math

import torch
import torch.nn.functional as F
from marking import close, exercise, expect, gradients, in_words, leaf, need_tensor, wrong


def nearest(z, codebook, mix=False, last=False):
    "Scores (B,h,w,K) that the nearest code minimises; `mix` reshapes without moving the channels."
    B, C, h, w = z.shape
    tokens = z.reshape(-1, C) if mix else z.movedim(1, -1).reshape(-1, C)
    return (tokens[:,None] - codebook).square().sum(-1).view(B, h, w, -1)

@exercise(1, "the nearest code")
def check_nearest_code(nearest_code):
    "z (2,3,4,5) and 7 codes, two of them equal."
    z, codebook = torch.randn(2, 3, 4, 5), torch.randn(7, 3)*torch.linspace(.3, 2, 7)[:,None]
    codebook[5] = codebook[1]
    d, mixed = nearest(z, codebook), nearest(z, codebook, mix=True)
    dot = torch.einsum("bchw,kc->bhwk", z, codebook)
    expect(nearest_code(z, codebook), d.argmin(-1), "the codes", {
        "you took the largest distance instead of the smallest: arg-min is asked for, not arg-max.": d.argmax(-1),
        "you mixed channels and positions: z.reshape(-1, C) cuts the memory in pieces; move the channels last first (movedim(1, -1)).": mixed.argmin(-1),
        "you took the largest dot product: a long code wins too often; the distance also holds the code's own length.": dot.argmax(-1),
        "of two equally near codes you took the last; the rule is: the lowest index wins.": d.shape[-1] - 1 - d.flip(-1).argmin(-1),
        "you took the second nearest code.": d.argsort(dim=-1, stable=True)[...,1],
    }, {
        (40,): "did you reshape back to (B,h,w)?", (2, 20): "did you reshape back to (B,h,w)?",
        (7,): "you took the arg-min over the tokens; take it over the codes (the last axis).",
        (2, 5, 4): "h and w have changed places.", (2, 4, 5, 7): "these are the distances; the arg-min is missing.",
        (2, 4, 5, 3): "these are the codes' vectors; their numbers are asked for.", (2, 3, 4, 5): "these are vectors; the codes' numbers are asked for.",
    })


@exercise(2, "straight through")
def check_straight_through(straight_through):
    "The value is the code's, the gradient the token's."
    z, z_q = leaf(2, 3, 4, 4), leaf(2, 3, 4, 4)
    slope = torch.randn_like(z)
    out = straight_through(z, z_q)
    expect(out, z_q, "the values going forward", {
        "going forward you hand on z, the continuous features; the decoder must see the codes z_q.": z,
        "you added z and z_q; from z only the gradient is wanted, so subtract its value again, detached.": z + z_q,
        "the sign is the wrong way round: you return 2z - z_q.": 2*z - z_q,
    }, tol=1e-9)
    g_z, g_q = gradients((out*slope).sum(), z, z_q)
    if not g_z.any() and not g_q.any(): wrong("the values are right, but no gradient gets through to z: everything has been detached.")
    if not g_z.any(): wrong("the values are right, but no gradient gets through to z: it all goes to z_q. Detach the step from z to z_q.")
    if g_q.any(): wrong("the values are right, but a gradient also goes to z_q; the whole step (z_q - z) has to be detached.")
    if close(g_z, 2*slope): wrong("the gradient of z arrives twice.")
    expect(g_z, slope, "the gradient of z", {"the gradient of z arrives with the wrong sign.": -slope}, tol=1e-9)


@exercise(3, "the loss and its gradient")
def check_quantization_loss(quantization_loss, loss_gradient):
    "Value and gradients of both terms, then the gradients on paper."
    z, e, beta = leaf(2, 3, 4, 4), leaf(2, 3, 4, 4), .25
    apart, n = (z - e).detach(), z.numel()
    mean = apart.square().mean()
    loss = quantization_loss(z, e, beta)
    expect(loss, (1 + beta)*mean, "the loss", {
        "you added the squares up; take their mean over all numbers, so that the image's size does not matter.": (1 + beta)*mean*n,
        "you averaged over the tokens but added over the channels; take the mean over both.": (1 + beta)*mean*3,
        "you only have one term; codes and tokens each need theirs.": mean,
        "you only have the commitment term.": beta*mean, "both terms are weighted by beta; only the commitment term is.": 2*beta*mean,
        "neither term is weighted by beta: it belongs to the commitment term.": 2*mean,
    }, {(2, 3, 4, 4): "one number is asked for; take the mean."}, tol=1e-9)
    g_z, g_e = gradients(loss, z, e)
    right = 2*beta*apart/n, -2*apart/n
    both = (1 + beta)/beta*right[0]
    if close(g_z, both, 1e-9): wrong("the value is right, but nothing is held fixed: both terms pull at both sides. Detach z in the codebook term and e in the commitment term.")
    if close(g_z, right[0]/beta, 1e-9): wrong("the value is right, but the detach() are exchanged: the codebook term must hold z fixed, the commitment term e.")
    expect(g_z, right[0], "the gradient of z", tol=1e-9)
    expect(g_e, right[1], "the gradient of the codes", tol=1e-9)
    check_paper(loss_gradient(z.detach(), e.detach(), beta), right, beta, n)

def check_paper(found, right, beta, n):
    "The two gradients that the student worked out on paper."
    if not isinstance(found, tuple) or len(found) != 2: wrong("loss_gradient: return two tensors, the gradient of z and that of e.")
    expect(found[0], right[0], "loss_gradient: the gradient of z", {
        "loss_gradient: the gradient of z has the wrong sign; a step against it must bring z nearer to e.": -right[0],
        "loss_gradient: in the gradient of z the 2 of the square is missing.": right[0]/2,
        "loss_gradient: in the gradient of z the mean is missing (divide by z.numel()).": right[0]*n,
        "loss_gradient: the gradient of z is that of the codebook term; z only feels the commitment term, with beta.": right[0]/beta}, tol=1e-9)
    expect(found[1], right[1], "loss_gradient: the gradient of e", {
        "loss_gradient: the gradient of e has the wrong sign; a step against it must bring e nearer to z.": -right[1],
        "loss_gradient: in the gradient of e the 2 of the square is missing.": right[1]/2,
        "loss_gradient: in the gradient of e the mean is missing (divide by z.numel()).": right[1]*n,
        "loss_gradient: e only feels the codebook term, which has no beta.": right[1]*beta}, tol=1e-9)


@exercise(4, "perplexity, and a cure")
def check_perplexity(perplexity, restart_dead):
    "A hand-made histogram; then codes that nobody took."
    codes = torch.tensor([[0, 1], [2, 0]])
    entropy = 1.5*math.log(2)
    expect(perplexity(codes, 5), torch.tensor(math.exp(entropy)), "the perplexity", {
        "this is the entropy; the perplexity is its exponential.": torch.tensor(entropy),
        "this is the entropy in bits; take exp of the one in nats (natural logarithm).": torch.tensor(1.5),
        "the logarithm is to the base 2 but the exponential to the base e; take the same base for both.": torch.tensor(math.exp(1.5)),
        "the minus sign of the entropy is missing.": torch.tensor(math.exp(-entropy)),
        "you counted the codes in use (the usage); the perplexity also asks how evenly they are used.": torch.tensor(3.),
    }, {(5,): "one number is asked for; add over the codes."})
    expect(perplexity(torch.zeros(3, 3, dtype=torch.int64), 4), torch.tensor(1.), "the perplexity of one busy code among four")
    check_restart(restart_dead)

def check_restart(restart_dead):
    "Codes 1 and 3 of four are dead; asked six times, because it draws at random."
    old, tokens, codes = torch.randn(4, 3), 10 + torch.randn(50, 3), torch.tensor([0, 2]*25)
    landed = []
    for _ in range(6):
        new = restart_dead(old.clone(), tokens, codes)
        need_tensor(new, old, "restart_dead: the codebook", {(2, 3): "return the whole codebook, not the moved codes alone."})
        moved = (new != old).any(1).tolist()
        if moved == [True, False, True, False]: wrong("restart_dead: you moved the codes in use instead of the dead ones.")
        if moved[0] or moved[2]: wrong("restart_dead: you also moved codes that are in use; only codes that no token took may move.")
        if not (moved[1] and moved[3]): wrong("restart_dead: a dead code stayed where it was.")
        gap, place = torch.cdist(new[1::2], tokens, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        if gap.max() > 1e-4: wrong("restart_dead: a dead code must land exactly on one of the tokens.")
        landed.append(tuple(place.tolist()))
    if all(i == j for i, j in landed): wrong("restart_dead: all dead codes land on the same token; draw one for each.")
    if len(set(landed)) == 1: wrong("restart_dead: the dead codes land on the same tokens every time; draw them at random.")


def attend(z_dis, z_con, Wq, Wk, Wv, heads, swap=False, axis=-1, scale=None, split="right", merge="right"):
    "Cross-attention with one possible mistake."
    B, n, C = z_dis.shape
    if swap: z_dis, z_con = z_con, z_dis
    def cut(x): return x.unflatten(-1, (heads, -1)).transpose(1, 2) if split == "right" else x.reshape(B, heads, n, -1)
    q, k, v = cut(z_dis @ Wq), cut(z_con @ Wk), cut(z_con @ Wv)
    weights = (q @ k.mT * (q.shape[-1]**-.5 if scale is None else scale)).softmax(axis)
    out = weights @ v
    return out.transpose(1, 2).flatten(2) if merge == "right" else out.reshape(B, n, C)

@exercise(5, "DisConX")
def check_cross_attention(cross_attention):
    "6 tokens of 8 channels, 2 heads."
    z = torch.randn(2, 2, 6, 8)
    W = torch.randn(3, 8, 8)/2
    asked = (*z, *W, 2)
    d = 4
    expect(cross_attention(*asked), attend(*asked), "the answers", {
        "the roles are exchanged: the discrete map asks (query), the continuous map answers (key and value).": attend(*asked, swap=True),
        "the query comes from the continuous map too; the discrete map must ask.": attend(z[1], z[1], *W, 2),
        "key and value come from the discrete map too; the continuous map must answer.": attend(z[0], z[0], *W, 2),
        "the softmax runs over the queries; each query shares its weight over the keys (the last axis).": attend(*asked, axis=-2),
        "the scores are not divided by the square root of d.": attend(*asked, scale=1.),
        "the scores are divided by the root of all channels; a head only has d = C/heads of them.": attend(*asked, scale=8**-.5),
        "the scores are divided by d, not by its square root.": attend(*asked, scale=1/d),
        "you used one head; split the channels into the heads first.": attend(*z, *W, 1),
        "the heads cut the tokens instead of the channels: (B,n,C) -> (B,n,heads,d) first, then transpose to (B,heads,n,d).": attend(*asked, split="wrong"),
        "the heads are put side by side wrongly: transpose back to (B,n,heads,d) before you flatten.": attend(*asked, merge="wrong"),
        "the heads cut the tokens instead of the channels: (B,n,C) -> (B,n,heads,d) first, then transpose to (B,heads,n,d). ": attend(*asked, split="wrong", merge="wrong"),
        "key and value matrices are exchanged.": attend(*z, W[0], W[2], W[1], 2),
    }, {(2, 2, 6, 4): "the heads have not been put side by side again.", (2, 2, 6, 6): "these are the weights; multiply them with the values."})


@exercise(6, "hard attention")
def check_hard_weights(hard_weights):
    "Scores with a tie; forward the indicator, backward the softmax."
    scores = leaf(2, 5, 5).detach()
    scores[0,0] = torch.tensor([1., 3, 0, 3, 2])
    scores.requires_grad_()
    one_hot = lambda i: F.one_hot(i, 5).double()
    hard, soft = one_hot(scores.argmax(-1)), scores.softmax(-1)
    weights = hard_weights(scores)
    expect(weights, hard, "the weights", {
        "going forward your weights are the softmax; the forward pass must be hard: 1 for the winner, 0 for all others.": soft,
        "with a tie your row has two winners; the lowest index alone wins (argmax gives it, == max does not).": (scores == scores.amax(-1, keepdim=True)).double(),
        "of two equal scores you took the last; the lowest index wins.": one_hot(4 - scores.flip(-1).argmax(-1)),
        "you took the smallest score instead of the largest.": one_hot(scores.argmin(-1)),
        "the winner is chosen down the columns (among the queries); take it along each row.": one_hot(scores.argmax(-2)).mT,
        "the winner is chosen down the columns (among the queries); take it along each row. ": one_hot(scores.argmax(-2)),
        "you added hard and soft weights; the soft part's value has to be taken away again, detached.": hard + soft,
    }, {(2, 5): "these are the winners' numbers; weights (one-hot) are asked for."}, tol=1e-9)
    slope = torch.randn_like(scores)
    found, = gradients((weights*slope).sum(), scores)
    if not found.any(): wrong("the weights are right, but no gradient gets through: add soft - soft.detach().")
    want, = gradients((soft*slope).sum(), scores)
    expect(found, want, "the gradient of the scores", {
        "the gradient is that of the scores themselves; backwards the weights must look like softmax(scores).": slope,
        "the softmax behind the hard weights runs over the queries; it must run along each row.": gradients((scores.softmax(-2)*slope).sum(), scores)[0],
        "the gradient has the wrong sign: hard + soft - soft.detach().": -want}, tol=1e-9)


@exercise(7, "three bottlenecks")
def check_features(features):
    "Simple stand-ins take the places of the blocks."
    z = torch.randn(2, 3, 4, 4)
    quantize = lambda z: (z.round(), torch.tensor(.7))
    disconx, refine = lambda dis, con: 3*dis - 2*con.square(), lambda f: f.tanh()*5
    out = {kind: ask_features(features, kind, z, quantize, disconx, refine) for kind in ("continuous", "discrete", "synergy")}
    dis, dc = z.round(), disconx(z.round(), z)
    f = dis + z + dc
    expect(out["continuous"][0], z, "continuous: the features")
    expect(out["discrete"][0], dis, "discrete: the features", {"discrete: you return the continuous features.": z,
        "discrete: you added the continuous features; that is for the synergy.": dis + z})
    expect(out["synergy"][0], f + refine(f), "synergy: the features", {
        "synergy: this is z_f without the refinement; return z_f + refine(z_f).": f,
        "synergy: this is the refined map alone; the paper adds it to z_f.": refine(f),
        "synergy: z_con is missing from the sum z_f = z_dis + z_con + z_dc.": dis + dc + refine(dis + dc),
        "synergy: z_dis is missing from the sum z_f = z_dis + z_con + z_dc.": z + dc + refine(z + dc),
        "synergy: DisConX is missing from the sum z_f = z_dis + z_con + z_dc.": dis + z + refine(dis + z),
        "synergy: the roles in DisConX are exchanged: disconx(z_dis, z_con).": (g := dis + z + disconx(z, dis)) + refine(g),
        "synergy: refine z_f, not z_dis.": f + refine(dis), "synergy: refine z_f, not z_con.": f + refine(z)})
    for kind, loss in (("discrete", .7), ("synergy", .7), ("continuous", 0.)):
        if abs(float(out[kind][1]) - loss) > 1e-5:
            wrong(f"{kind}: the second thing returned is the quantization loss; " + ("hand on what quantize gave." if loss else "without a quantizer it is 0."))

def ask_features(features, *arguments):
    "What the student's function returns, if it is a pair."
    pair = features(*arguments)
    if not isinstance(pair, tuple) or len(pair) != 2: wrong(f"{arguments[0]}: return two things, the features and the quantization loss.")
    return pair


@exercise(8, "in words")
def check_answer(text):
    "Long enough to be an answer; whether it is a good one, a person says."
    in_words(text, at_least=30)
