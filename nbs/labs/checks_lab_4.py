"""The checks of lab 4. Each says what is wrong in words; reading them is allowed, but try first."""
import math
from itertools import product

import pandas as pd
import torch
import torch.nn.functional as F
from marking import close, exercise, expect, gradients, in_words, leaf, wrong
from scipy.stats import rankdata, wilcoxon
from torch import nn

from medseg_nb.losses import LDCLoss, dual_step, info_nce
from medseg_nb.training.semisupervised import ramp_up
from medseg_nb.training.supervised import RunningAverage


@exercise(1, "whose labels")
def check_divide(divide):
    "Seven people with two frames each, not in order; ten seeds."
    person_of = {f"{who}{frame}": who for frame in (1, 10) for who in "dagcebf"}
    before, kept = dict(person_of), []
    for seed in range(10):
        found = divide(person_of, 3, seed)
        if person_of != before: wrong("your function changed the dict it was given; another run would see other people.")
        check_division(found, person_of, 3)
        kept.append(frozenset(person_of[case] for case in found[0]))
    if set(divide(person_of, 3, 9)[0]) != set(found[0]): wrong("the same seed gave other people the second time; only `order` may decide.")
    if len(set(kept)) == 1: wrong("the same people whatever the seed; take them in the order that was drawn (`order`).")
    if len(set(kept)) < 4: wrong("ten seeds gave hardly any different people; `order` holds the numbers of the people, each drawn once.")

def check_division(found, person_of, labelled):
    "Whether two lists hold every case once, and every person on one side."
    if found is None: wrong("your function returned nothing; is the `return` missing?")
    if not isinstance(found, tuple) or len(found) != 2: wrong("return two lists of cases: those with labels, and the others.")
    first, second = (list(part) for part in found)
    people = set(person_of.values())
    if set(first) | set(second) <= people: wrong("these are people; their cases are asked for, two frames of each.")
    if strange := (set(first) | set(second)) - set(person_of): wrong(f"these are not cases: {sorted(map(str, strange))[:3]}.")
    whose = [{person_of[case] for case in part} for part in (first, second)]
    if set(first) & set(second): wrong("a case is in both lists; the second holds those that are not in the first.")
    if shared := whose[0] & whose[1]: wrong(f"person {min(shared)} is on both sides, with one frame each: you divided the cases; divide the people.")
    if lost := set(person_of) - set(first) - set(second): wrong(f"{len(lost)} of {len(person_of)} cases are in neither list; each person has two.")
    if len(whose[0]) == len(people) - labelled: wrong("the two lists are exchanged: those with labels come first.")
    if len(whose[0]) != labelled: wrong(f"{labelled} people were to keep their labels, here {len(whose[0])} do.")


def trail(net, follow, start, steps, decay):
    "The weights of a teacher after the student `net` has walked at random; the random numbers depend on `start` alone."
    draw, teacher = torch.Generator().manual_seed(start), [p.detach().clone() for p in net.parameters()]
    student = [p.detach().clone() for p in net.parameters()]
    for step in range(start, start + steps):
        for p in student: p.add_(torch.randn(p.shape, generator=draw, dtype=p.dtype))
        follow(teacher, student, step, decay)
    return torch.cat([p.flatten() for p in teacher]), torch.cat([p.flatten() for p in student])

def trusted(teacher, student, step, decay):
    "The library's average, on lists of tensors."
    average = RunningAverage(nn.ParameterList(teacher), decay)
    average.update(nn.ParameterList(student), step)
    for old, new in zip(teacher, average.model.parameters(), strict=True): old.copy_(new)

def moving(share, keep=lambda d: d):
    "A teacher that keeps keep(d) of itself and takes share(d) of the student; d as a function of step and decay."
    def answer(rule):
        def follow(teacher, student, step, decay):
            d = rule(step, decay)
            for old, new in zip(teacher, student, strict=True): old.copy_(keep(d)*old + share(d)*new)
        return follow
    return answer

def early(step, decay): return min(decay, (1 + step)/(10 + step))

@exercise(2, "the teacher")
def check_follow(follow, half_life):
    "One step, the second step, then late ones, against the library's average."
    net, decay = nn.Linear(4, 3).double(), .6
    mistaken = lambda start, steps, rule, share=lambda d: 1 - d, keep=lambda d: d: trail(net, moving(share, keep)(rule), start, steps, decay)[0]
    for start, steps, when in ((0, 1, "after the first step"), (0, 6, "after six steps"), (100, 3, "late in the run")):
        want, student = trail(net, trusted, start, steps, decay)
        got, now = trail(net, follow, start, steps, decay)
        if not close(now, student, 1e-9): wrong("the student was changed; it is the teacher who moves.")
        expect(got, want, f"the teacher {when}", {
            f"the teacher {when}: it has not moved; change the tensors in place (`old = ...` only gives a name to a new one).": torch.cat([p.detach().flatten() for p in net.parameters()]),
            f"the teacher {when}: the shares are exchanged; the teacher keeps d of itself and takes 1 - d of the student.": mistaken(start, steps, early, lambda d: d, lambda d: 1 - d),
            f"the teacher {when}: the student was copied; then there is no memory.": student,
            f"the teacher {when}: `step` counts from 0; in the first step (1 + step)/(10 + step) is 0.1.": mistaken(start, steps, lambda s, d: early(s + 1, d)),
            f"the teacher {when}: at first the decay must be smaller, (1 + step)/(10 + step), or the teacher long remembers weights that knew nothing.": mistaken(start, steps, lambda s, d: d),
            f"the teacher {when}: (1 + step)/(10 + step) goes to 1; it must not exceed `decay`; take the smaller of the two.": mistaken(start, steps, lambda s, d: (1 + s)/(10 + s)),
            f"the teacher {when}: the student's share was added, but the teacher did not shrink to d.": mistaken(start, steps, early, keep=lambda d: 1),
            f"the teacher {when}: it shrinks to d, but the whole student was added; take 1 - d of it.": mistaken(start, steps, early, lambda d: 1),
        }, tol=1e-9)
    check_half_life(float(half_life(.9)))

def check_half_life(found):
    "How long a teacher remembers."
    right = math.log(.5)/math.log(.9)
    if abs(found + right) < 1e-2: wrong("half_life: the sign; ln(1/2) and ln(d) are both negative.")
    if abs(found - 1/right) < 1e-2: wrong("half_life: upside down; solve d^n = 1/2 for n.")
    if abs(found - 10) < 1e-2: wrong("half_life: 1/(1 - d) is the mean age of what the teacher holds; solve d^n = 1/2.")
    if abs(found - 5) < 1e-2: wrong("half_life: the weight falls by a factor a step, not by an amount; solve d^n = 1/2.")
    if found == math.ceil(right): return
    if abs(found - right) > 1e-2: wrong(f"half_life: for d = 0.9 it is {right:.2f} steps, yours is {found:g}.")


def trusted_gap(p, y):
    "The value of constraint (2) in the library's loss."
    loss = LDCLoss(p.shape[1], activation="none", check_labels=False).double()
    loss(p, y)
    return loss.values["mass"]

@exercise(3, "a price")
def check_price(gap, ascend):
    "Three classes; then prices of either sign."
    p, y = (torch.randn(2, 3, 4, 5, dtype=torch.double).softmax(1) for _ in range(2))
    y[0] *= .5                                                            # images that differ, for means taken wrongly
    right, each = trusted_gap(p, y), (p - y).mean((2, 3))
    expect(gap(p, y), right, "the gap", {
        "the gap: the sign; too much mass must give a value above 0.": -right, "the gap: sums grow with the image; take means.": (p - y).sum((0, 2, 3))[1:],
        "the gap: absolute values hide whether there is too much or too little.": right.abs(), "the gap: take the mean before any absolute value; a pixel too much makes up for one too little.": (p - y).abs().mean((0, 2, 3))[1:],
        "the gap: you left out the last class; the background is the first.": each.mean(0)[:-1], "the gap: this is a share of y; the plain difference is asked for.": right/y.mean((0, 2, 3))[1:],
        "the gap: you added over the images; take their mean.": each.sum(0)[1:], "the gap: this is p's mass alone; take away that of y.": p.mean((0, 2, 3))[1:],
    }, {(3,): "the background is left out: it has what the others leave.", (2, 2): "take the mean over the images too.", (2, 3): "take the mean over the images too, and leave the background out.",
        (): "one number a class is asked for.", (2, 2, 4, 5): "take means over images and pixels."}, tol=1e-8)
    expect(gap(p, p), torch.zeros(2, dtype=torch.double), "the gap of p and p", tol=1e-8)
    price, value = torch.tensor([1., .1, -.1, -1., 0.]).double(), torch.tensor([-.8, -.8, .8, .8, .5]).double()
    for relation in ("equal", "at most", "at least"): check_ascend(ascend, price, value, relation)

def check_ascend(ascend, price, value, relation):
    "One step of every sign."
    right = {r: dual_step(price, value, .5, r) for r in ("equal", "at most", "at least")}
    before = price.clone()
    projected = {"equal": lambda m: m, "at most": lambda m: m.clamp_min(0), "at least": lambda m: m.clamp_max(0)}[relation]
    mistakes = {"the wrong direction: too much must raise the price.": projected(price - .5*value), "the rate is missing.": projected(price + value),
                "the rate multiplies the value, not the price.": projected(.5*price + value), "only the change came back; add it to the price.": projected(.5*value)}
    if relation == "equal": mistakes |= {"of an equality the price may have either sign; nothing is cut off.": right["at most"], "of an equality the price may have either sign; nothing is cut off. ": right["at least"]}
    else:
        other = "at least" if relation == "at most" else "at most"
        bound = "below 0" if relation == "at most" else "above 0"
        mistakes |= {f"the projection is missing; this price may not go {bound}.": right["equal"], f"this price may not go {bound}; you have it the other way round.": right[other],
                     "project what the step gives, not what it adds: a price may fall.": price + projected(.5*value), "project after the step, not before.": projected(price) + .5*value}
    expect(ascend(price, value, .5, relation), right[relation], f'"{relation}"', {f'"{relation}": {words}': v for words, v in mistakes.items()}, tol=1e-9)
    if not torch.equal(price, before): wrong("the price was changed in place; return a new tensor.")


@exercise(4, "the quiz")
def check_quiz(quiz, guessing):
    "Five slices; values, then gradients."
    h_t, h_s = (F.normalize(torch.randn(5, 3, dtype=torch.double), dim=1).requires_grad_() for _ in range(2))
    tau, (t, s) = .4, (h.detach() for h in (h_t, h_s))
    scores, loss = t @ s.mT/tau, quiz(h_t, h_s, tau)
    ask = lambda scores, how="mean": F.cross_entropy(scores, torch.arange(5), reduction=how)
    others = scores.exp().sum(1) - scores.diagonal().exp()
    expect(loss, info_nce(t, s, tau), "eq. 4", {
        "eq. 4: divide by tau, do not multiply.": ask(t @ s.mT*tau), "eq. 4: tau is missing.": ask(t @ s.mT),
        "eq. 4: the roles are exchanged; the teacher's vector asks, and all of the student's are the answers (a row a question).": ask(scores.mT),
        "eq. 4: you added over the slices; take their mean, so that the loss does not grow with the batch.": ask(scores, "sum"),
        "eq. 4: the sign is missing; a good answer must cost little.": -ask(scores), "eq. 4: the logarithm is missing.": scores.softmax(1).diagonal().mean(),
        "eq. 4: the positive is missing below; without it the fraction can exceed 1.": (others.log() - scores.diagonal()).mean(),
        "eq. 4: take the logarithm slice by slice, then the mean.": -scores.softmax(1).diagonal().mean().log(),
        "eq. 4: this is the likeness alone; the other slices must be compared with.": -scores.diagonal().mean(),
        "eq. 4: the student is compared with the student.": ask(s @ s.mT/tau), "eq. 4: the teacher is compared with the teacher.": ask(t @ t.mT/tau),
    }, {(5,): "one number is asked for; take the mean over the slices.", (5, 5): "one number is asked for; of each row the right answer."}, tol=1e-8)
    g_t, g_s = gradients(loss, h_t, h_s)
    if g_t.any(): wrong("the value is right, but a gradient goes to the teacher; it asks and does not learn (detach).")
    if not g_s.any(): wrong("the value is right, but no gradient reaches the student.")
    expect(quiz(t, s, 1e-3), info_nce(t, s, 1e-3), "a tau of 0.001 (log_softmax or cross_entropy, not the log of an exp)", tol=1e-6)
    check_guessing(float(guessing(8)))

def check_guessing(found):
    "What a student pays who cannot tell n slices apart."
    if abs(found + math.log(8)) < 1e-3: wrong("guessing: the sign; -log(1/n).")
    if abs(found - 1/8) < 1e-3: wrong("guessing: that is the chance to be right; its price is -log of it.")
    if abs(found - math.log(7)) < 1e-3: wrong("guessing: the right answer is among the n.")
    if abs(found - 3) < 1e-3: wrong("guessing: in bits; eq. 4 has the natural logarithm.")
    if abs(found - math.log(8)) > 1e-3: wrong(f"guessing: for 8 slices it is {math.log(8):.3f}, yours is {found:g}.")


@exercise(5, "eq. 5")
def check_total(hold_against, eq5):
    "Two images with labels, three without; then stand-ins for the three terms."
    y, taught = torch.randint(0, 3, (2, 4, 5)), leaf(5, 3, 4, 5)
    truth, t = F.one_hot(y, 3).movedim(-1, 1).double(), taught.detach()
    p = t.softmax(1)
    got = hold_against(y, taught)
    expect(got.double() if isinstance(got, torch.Tensor) and got.is_floating_point() else got, torch.cat([truth, p[2:]]), "the target", {
        "the target: the labels are not used; where there are some, they are the target.": p,
        "the target: these are the teacher's logits; L_con wants probabilities (softmax over the classes).": torch.cat([truth, t[2:]]),
        "the target: the softmax runs over the pixels; it runs over the classes, axis 1.": torch.cat([truth, t.softmax(-1)[2:]]),
        "the target: the softmax runs over the pixels; it runs over the classes, axis 1. ": torch.cat([truth, t.softmax(-2)[2:]]),
        "the target: the softmax runs over the images; it runs over the classes, axis 1.": torch.cat([truth, t.softmax(0)[2:]]),
        "the target: the images with labels come first.": torch.cat([p[2:], truth]), "the target: the teacher's answers for the *last* images are needed; these are for the first.": torch.cat([truth, p[:3]]),
        "the target: you took the teacher's arg-max; its doubts (the probabilities) are part of the target.": torch.cat([truth, F.one_hot(p[2:].argmax(1), 3).movedim(-1, 1).double()]),
        "the target: the sigmoids of a pixel do not sum to 1; softmax over the classes.": torch.cat([truth, t.sigmoid()[2:]]),
    }, {(5, 4, 5, 3): "the classes belong in the second place (movedim).", (7, 3, 4, 5): "an image has one target: leave out what the teacher says of those with labels.",
        (3, 3, 4, 5): "the images with labels are missing.", (2, 3, 4, 5): "the images without labels are missing."}, tol=1e-8)
    if got.requires_grad: wrong("the target: a gradient goes to the teacher; it is a target (detach).")
    for progress, ramp in ((.5, .3), (.1, .3), (0., .5), (1., .3)): check_eq5(eq5, progress, ramp)

def check_eq5(eq5, progress, ramp):
    "The sum at one moment of the run."
    sup, contrast, con = torch.tensor([1.7, 3.1, .9], dtype=torch.double)
    a, b, c = weights = (.8, .3, .6)
    x, when = progress/ramp, f"at progress {progress:g} with ramp {ramp:g}"
    total = lambda f, a=a, b=b, c=c, g=None: a*sup + b*(f if g is None else g)*contrast + c*f*con
    full, right = total(1.), total(ramp_up(progress, ramp))
    early = math.exp(-5*(1 - min(1, x))**2)
    mistakes = {
        "eq. 5: lambda is missing.": total(early, a=1), "eq. 5: beta and gamma are exchanged; beta weighs the contrast, gamma L_con.": total(early, b=c, c=b), "eq. 5: the weights are missing.": total(early, 1, 1, 1),
        "eq. 5: the contrast is missing.": total(early, b=0), "eq. 5: L_con is missing.": total(early, c=0), "eq. 5: L_sup is missing.": total(early, a=0)}
    if x < 1: mistakes = {
        f"{when}: the ramp weighs L_sup too; the labels count from the first step.": early*full, f"{when}: the ramp is missing.": full,
        f"{when}: L_con has no ramp.": total(1., g=early), f"{when}: the contrast has no ramp.": total(early, g=1.),
        f"{when}: the square is missing.": total(math.exp(-5*(1 - x))), f"{when}: the 5 is missing.": total(math.exp(-(1 - x)**2)),
        f"{when}: the minus is missing.": total(math.exp(5*(1 - x)**2)), f"{when}: the factor rises as a straight line; e^(-5 (1 - progress/ramp)^2) is asked for.": total(x),
        f"{when}: progress is not divided by ramp.": total(math.exp(-5*(1 - progress)**2)), f"{when}: the factor falls; at progress 0 it must be small.": total(math.exp(-5*x**2))} | mistakes
    else: mistakes = {f"{when}: the ramp is over, and its factor must stay 1 (min(1, progress/ramp)).": total(math.exp(-5*(1 - x)**2)),
                      f"{when}: the factor must not exceed 1.": total(x)} | mistakes
    expect(eq5(sup, contrast, con, progress, weights, ramp), right, f"the total {when}", mistakes, tol=1e-9)


def dice_of(found, other, classes, factor=2., absent=torch.nan, first=1, below=lambda a, b: a.sum() + b.sum()):
    "Dice of classes first to `classes` with one possible mistake."
    pairs = [(found == c, other == c) for c in range(first, classes + 1)]
    return torch.stack([factor*(a & b).sum()/below(a, b) if (a | b).any() else torch.tensor(absent) for a, b in pairs])

@exercise(6, "agreement")
def check_overlap(overlap):
    "Four classes, of which one map has the third only, and nobody the fourth."
    found, other = torch.randint(0, 3, (3, 7, 5)), torch.randint(0, 3, (3, 7, 5))
    found[0], other[1, :, :3] = 0, 0
    other[2, 0, 0] = 3
    either = lambda a, b: (a | b).sum()
    plain = lambda x: x.float().nan_to_num(-1.) if isinstance(x, torch.Tensor) else x      # NaN is right where both lack a class
    one = torch.stack([dice_of(f, o, 4) for f, o in zip(found, other, strict=True)])
    got = overlap(found, other, 4)
    if isinstance(got, (list, tuple)): wrong("return a tensor with a number a class.")
    expect(plain(got), plain(dice_of(found, other, 4)), "the Dice", {
        "the Dice: a class that neither has counts 0; that is no mistake of anybody, say NaN.": plain(dice_of(found, other, 4, absent=0.)),
        "the Dice: a class that neither has counts 1; the mean would praise what nobody saw, say NaN.": plain(dice_of(found, other, 4, absent=1.)),
        "the Dice: the 2 is missing.": plain(dice_of(found, other, 4, 1.)), "the Dice: this is the Jaccard index; the Dice has twice the shared pixels above and the sum of both below.": plain(dice_of(found, other, 4, 1., below=either)),
        "the Dice: below it takes all pixels of both (their sum), not of either (their union).": plain(dice_of(found, other, 4, below=either)),
        "the Dice: this is the share of the first map's pixels that are shared (precision).": plain(dice_of(found, other, 4, 1., below=lambda a, b: a.sum())),
        "the Dice: this is the share of the second map's pixels that are shared (recall).": plain(dice_of(found, other, 4, 1., below=lambda a, b: b.sum())),
        "the Dice: these are the classes 0 to 3; the background is left out.": plain(dice_of(found, other, 3, first=0)),
        "the Dice: you took the mean over the images; add their pixels up first, all images at once.": plain(one.nanmean(0)),
    }, {(5,): "the background is left out.", (3, 4): "all images at once: one number a class.", (): "a number a class; the mean comes later."}, tol=1e-6)


@exercise(7, "did they help?")
def check_paired(by_person, signed_rank):
    "Three people with two, one and three cases; then six differences."
    person_of = {"a1": "a", "b1": "b", "a2": "a", "c1": "c", "c2": "c", "c3": "c"}
    scores = pd.DataFrame({"one": [.1, .9, .5, .2, .4, .9], "two": [.3, .3, .2, .8, .1, .6]}, list(person_of))
    groups = scores.groupby(person_of)
    check_people(by_person(scores, person_of), groups)
    d = torch.tensor([-.15, .27, .24, .18, .03, .13], dtype=torch.double)
    check_rank(signed_rank, d)
    if not close(torch.as_tensor(signed_rank(-d)).double(), torch.as_tensor(signed_rank(d)).double(), 1e-6): wrong("signed_rank: with all signs turned it gives another share; both directions are equally far from the middle.")

def check_people(found, groups):
    "A row a person."
    if found is None: wrong("by_person: your function returned nothing; is the `return` missing?")
    if not isinstance(found, pd.DataFrame): wrong(f"by_person: you returned a {type(found).__name__}; a table is asked for, a row a person.")
    near = lambda table: found.shape == table.shape and list(found.index) == list(table.index) and (found - table).abs().max().max() < 1e-9
    if len(found) == 6: wrong("by_person: there is still a row a case; the frames of a person belong together.")
    if near(groups.sum()): wrong("by_person: you added the frames up; take their mean.")
    if near(groups.first()) or near(groups.last()): wrong("by_person: one frame of each person is used; take the mean of all.")
    if near(groups.max()): wrong("by_person: the best frame of each person is used; take the mean of all.")
    if not near(groups.mean()): wrong("by_person: not right; expected a row a person with the mean over the person's cases, every column by itself.")

def ranked(d, ranks, far=lambda all_, seen: all_ >= seen - 1e-9):
    "The share of the ways to choose the signs that `far` picks; distances from the middle."
    ways = torch.tensor(list(product((0., 1.), repeat=len(d)))).to(d)
    middle = ranks.sum()/2
    return far((ways @ ranks - middle).abs(), ((d > 0).to(d) @ ranks - middle).abs()).double().mean()

def check_rank(signed_rank, d):
    "Against SciPy's exact test."
    order = torch.from_numpy(rankdata(d.abs()))
    right = torch.tensor(wilcoxon(d.numpy(), method="exact").pvalue).double()
    ways, W = torch.tensor(list(product((0., 1.), repeat=len(d)))).to(d) @ order, (d > 0).to(d) @ order
    expect(signed_rank(d), right, "signed_rank", {
        "signed_rank: this is the number of ways; divide by how many there are.": right*2**len(d),
        "signed_rank: only one side; as far below the middle counts too.": (ways >= W - 1e-9).double().mean(), "signed_rank: only one side; as far below the middle counts too. ": (ways <= W + 1e-9).double().mean(),
        "signed_rank: at least as far; the signs that were seen count themselves.": ranked(d, order, lambda a, s: a > s + 1e-9),
        "signed_rank: you counted the ways that are no farther from the middle than yours.": ranked(d, order, lambda a, s: a <= s + 1e-9),
        "signed_rank: you counted the ways that are nearer to the middle than yours.": ranked(d, order, lambda a, s: a < s - 1e-9),
        "signed_rank: these are the ranks of the differences; rank their sizes (abs).": ranked(d, torch.from_numpy(rankdata(d))),
        "signed_rank: ranks begin at 1.": ranked(d, order - 1), "signed_rank: the largest difference has the largest rank.": ranked(d, len(d) + 1 - order),
        "signed_rank: argsort says who comes first, not who is how far; ranks are the argsort of the argsort.": ranked(d, d.abs().argsort().to(d) + 1),
        "signed_rank: these are the differences themselves (the test of lab 3); the ranks are asked for.": ranked(d, d.abs()),
    }, {(2**len(d),): "one number is asked for: the share of the ways."}, tol=1e-6)


@exercise(8, "in words")
def check_answer(text):
    "Long enough to be an answer; whether it is a good one, a person says."
    in_words(text, at_least=40)
