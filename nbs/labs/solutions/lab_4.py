"""Solutions of lab 4. Each part below is the whole of one exercise's cell."""
import math
from itertools import product

import torch
import torch.nn.functional as F

# %%
# Exercise 1: whose labels
def divide(person_of, labelled, seed=0):
    "{case: person} -> two lists of cases: those of `labelled` people drawn at random, and those of all others."
    people = sorted(set(person_of.values()))
    order = torch.randperm(len(people), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = {people[i] for i in order[:labelled]}
    return [case for case, who in person_of.items() if who in kept], [case for case, who in person_of.items() if who not in kept]

# %%
# Exercise 2: the teacher
def follow(teacher, student, step, decay):
    "Lists of tensors: each of the teacher's becomes d times itself plus 1 - d times the student's, in place."
    d = min(decay, (1 + step)/(10 + step))
    with torch.no_grad():
        for old, new in zip(teacher, student, strict=True): old.lerp_(new, 1 - d)

def half_life(decay):
    "The number of steps n with decay^n = 1/2."
    return math.log(.5)/math.log(decay)

# %%
# Exercise 3: a price
def gap(p, y):
    "p, y (B,Z,H,W) -> (Z-1,): g of constraint (2), the mean of p minus the mean of y over images and pixels, without the background."
    return (p - y).mean((0, 2, 3))[1:]

def ascend(price, value, rate, relation="equal"):
    'One projected step of dual ascent; the value is to be "equal" to, "at most" or "at least" 0.'
    moved = price + rate*value
    if relation == "at most": return moved.clamp_min(0)
    if relation == "at least": return moved.clamp_max(0)
    return moved

# %%
# Exercise 4: the quiz
def quiz(h_t, h_s, tau=.1):
    "h_t, h_s (n,d), vectors of length 1 of the same slices -> a number, eq. 4, mean over the slices."
    scores = h_t.detach() @ h_s.mT/tau                         # (n,n) a row a question of the teacher
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))

def guessing(n):
    "What a student pays who cannot tell n slices apart."
    return math.log(n)

# %%
# Exercise 5: eq. 5
def hold_against(y, taught):
    "y (n,H,W) labels of the first n images, taught (B,Z,H,W) the teacher's logits of all -> (B,Z,H,W) probabilities."
    truth = F.one_hot(y, taught.shape[1]).movedim(-1, 1).to(taught)            # (n,H,W) -> (n,H,W,Z) -> (n,Z,H,W)
    return torch.cat([truth, taught[len(y):].detach().softmax(1)])

def eq5(sup, contrast, con, progress, weights=(1., .1, 1.), ramp=.3):
    "L_sup, L_contrast, L_con -> their weighted sum; progress: the share of the run that is over."
    a, b, c = weights
    factor = math.exp(-5*(1 - min(1, progress/ramp))**2)
    return a*sup + factor*(b*contrast + c*con)

# %%
# Exercise 6: agreement
def overlap(found, other, classes):
    "found, other (N,H,W) class ids -> (classes,): Dice of the classes 1, 2, ... over all pixels of all images; NaN where neither has any."
    pairs = [(found == c, other == c) for c in range(1, classes + 1)]
    return torch.stack([2*(a & b).sum()/(a.sum() + b.sum()) for a, b in pairs])   # 0/0 is NaN

# %%
# Exercise 7: did they help?
def by_person(scores, person_of):
    "A table with a row a case, {case: person} -> a table with a row a person: the mean over the person's cases."
    return scores.groupby(person_of).mean()

def signed_rank(differences):
    "(n,) differences, one a person -> the share of the 2^n ways to choose their signs whose W is at least as far from the middle."
    ranks = differences.abs().argsort().argsort() + 1.                                       # (n,) 1: the smallest
    W = ranks[differences > 0].sum()
    ways = torch.tensor(list(product((0., 1.), repeat=len(ranks)))) @ ranks                  # (2^n,) W of each way
    return ((ways - ranks.sum()/2).abs() >= (W - ranks.sum()/2).abs()).double().mean()

# %%
# Exercise 8: in words (only the length is checked)
answer = """
Not here. Against the right control, the same losses on the labelled person alone, all eight people lose about three hundredths of Dice with the first seed, the smallest share that eight people can give; with the second seed half of them gain, and the mean is
about a hundredth up. So the start of the training moves the Dice as much as those images do, and the test over people could not know. Of the step down from supervised to LDC a part, about two hundredths, comes with the losses themselves and not with the images.
The mean teacher gains a hundredth in seven of eight people, but with one seed. With lambda = 0, L_con became small and the agreement stayed high, while the Dice of unseen hearts fell: student and teacher confirm each other's mistakes, and only pseudo_dice, which needs labels, told.
Where nobody has the labels I would keep some labelled people aside to validate; next: five seeds of each run, longer training, and more labelled people.
"""
