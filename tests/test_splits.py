"Who trains and whose labels may be used: percentages, people kept together, nested shares, requests that cannot be met."

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_nb.core import DatasetError
from medseg_nb.data import labelled_cases, split_cases
from medseg_nb.data.collections import Case, Collection, subject_of


def cases_of(frames):
    "A patient for each number, with so many frames."
    return [Case(f"p{i:03d}_frame{f:02d}", ()) for i, n in enumerate(frames) for f in range(n)]


def collection_of(frames):
    return Collection("somewhere", "x", {0: "background", 1: "a"}, {0: "MRI"}, cases_of(frames))


def people(cases):
    return {subject_of(c.id) for c in cases}


FRAMES = st.lists(st.integers(1, 3), min_size=3, max_size=60)


@settings(max_examples=60, deadline=None)
@given(FRAMES, st.integers(0, 99), st.sampled_from([(80, 15, 5), (70, 10, 20), (50, 25, 25)]))
def test_percentages_are_of_people(frames, seed, percent):
    collection = collection_of(frames)
    parts = split_cases(collection, "/".join(map(str, percent)), seed)
    n, found = len(frames), [people(parts[p]) for p in ("train", "validation", "test")]
    assert set.union(*found) == people(collection.cases) and sum(map(len, found)) == n
    assert [len(f) for f in found[1:]] == [max(1, round(p / 100 * n)) for p in percent[1:]]
    assert split_cases(collection, "70/10/20", seed) == split_cases(collection, "random", seed)


def test_random_is_what_it_was():
    "The order that runs already made depend on: a permutation of sorted people, the first ones test, then those that validate."
    collection = collection_of([2] * 20)
    order = np.random.default_rng(5).permutation(sorted(people(collection.cases)))
    parts = split_cases(collection, "random", 5)
    assert people(parts["test"]) == set(order[:4]) and people(parts["validation"]) == set(order[4:6])


@pytest.mark.parametrize("rule", ["80/15/10", "80/20/0", "80/20", "100/0/0", "a/b/c", "-80/90/90", "80.5/14.5/5", "80/15/5/0", "/"])
def test_percentages_that_do_not_add_up(rule):
    with pytest.raises(DatasetError, match="do not add up.*80/15/5"): split_cases(collection_of([1] * 20), rule)


def test_a_split_without_people_to_train_is_refused():
    with pytest.raises(DatasetError, match="leaves a part empty"): split_cases(collection_of([1] * 4), "10/80/10")


@settings(max_examples=80, deadline=None)
@given(FRAMES, st.integers(0, 99), st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.randoms())
def test_labelled_people(frames, seed, a, b, random):
    cases, n = cases_of(frames), len(frames)
    small, large = sorted((a, b))
    chosen = []
    for share in (small, large):
        if not 0 < round(share * n) < n:
            with pytest.raises(DatasetError, match=f"of {n} people"): labelled_cases(cases, share, seed)
            continue
        labelled, unlabelled = labelled_cases(cases, share, seed)
        assert people(labelled) | people(unlabelled) == people(cases) and not people(labelled) & people(unlabelled)
        assert len(people(labelled)) == round(share * n) and len(labelled) + len(unlabelled) == len(cases)
        assert [c for c in cases if c in labelled] == labelled  # in the order given
        assert labelled_cases(cases, round(share * n), seed) == (labelled, unlabelled)  # a number says the same
        shuffled = random.sample(cases, len(cases))
        assert people(labelled_cases(shuffled, share, seed)[0]) == people(labelled)
        chosen.append(people(labelled))
    if len(chosen) == 2: assert chosen[0] <= chosen[1]  # nested


def test_seeds_and_groups():
    cases = cases_of([1] * 30)
    assert len({tuple(sorted(people(labelled_cases(cases, 10, seed)[0]))) for seed in range(5)}) == 5
    sides = [Case(f"{side}{i}", ()) for i in range(6) for side in ("left", "right")]
    labelled, unlabelled = labelled_cases(sides, 2, group=r"\d+$")
    assert len(labelled) == 4 and {c.id[-1] for c in labelled}.isdisjoint(c.id[-1] for c in unlabelled)


@pytest.mark.parametrize("labelled", [0, 6, -1, 1.0, 0.0, float("nan"), 0.01, True, None, "half", (1,)])
def test_impossible_requests(labelled):
    with pytest.raises(DatasetError, match="cannot be divided.*of 6 people.*1 to 5"): labelled_cases(cases_of([1] * 6), labelled)


def test_too_few_people_and_bad_seeds():
    for frames in ([], [3]):
        with pytest.raises(DatasetError, match="two people or more"): labelled_cases(cases_of(frames), 1)
    for seed in (-1, 1.5, None, True):
        with pytest.raises(DatasetError, match="seed"): labelled_cases(cases_of([1] * 6), 2, seed)
        with pytest.raises(DatasetError, match="seed"): split_cases(collection_of([1] * 6), "random", seed)
