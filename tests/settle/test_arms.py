"""What arms are called, which of them is the baseline, and what changes of their words."""

import pytest

from softmoe_cli.errors import UsageError
from softmoe_cli.settle.arms import baseline_of, labels, with_changes, without_seed

ROUTERS = [["model/router=dense", "optim.lr=0.1", "study=x"], ["model/router=soft", "optim.lr=0.1", "study=x"]]


def test_labels_tell_what_differs() -> None:
    assert labels(ROUTERS) == ["dense", "soft"]
    pairs = [(word, rate) for word in ("model/router=dense", "+experiment=a/b") for rate in ("1", "2")]
    rates = [[word, f"optim.lr={rate}"] for word, rate in pairs]
    assert labels(rates) == ["dense, lr=1", "dense, lr=2", "a/b, lr=1", "a/b, lr=2"]


def test_seeds_make_no_arms() -> None:
    jobs = [[*words, f"seed={seed}"] for words in ROUTERS for seed in (0, 1)]
    assert without_seed(jobs) == ROUTERS


def test_a_change_takes_the_place_of_what_was_typed() -> None:
    assert with_changes(["a=1", "+b.c=2"], ["b.c=3", "d=4"]) == ["a=1", "b.c=3", "d=4"]


def test_the_baseline_is_the_first_dense_arm_or_the_one_that_is_named() -> None:
    told = labels(ROUTERS)
    assert baseline_of(told, ROUTERS, [1, 0], None) == 1
    assert baseline_of(told, ROUTERS, [1, 1], None) == 0
    assert baseline_of(told, ROUTERS, [3, 1], None) == 1
    for named in ("soft", "model/router=soft"):
        assert baseline_of(told, ROUTERS, [0, 1], named) == 1
    no_arm = r"baseline=sofd: no arm is called or has that\. Did you mean 'soft'.*dense; soft"
    with pytest.raises(UsageError, match=no_arm):
        baseline_of(told, ROUTERS, [0, 1], "sofd")
    with pytest.raises(UsageError, match="baseline=study=x: 2 arms have that"):
        baseline_of(told, ROUTERS, [0, 1], "study=x")
