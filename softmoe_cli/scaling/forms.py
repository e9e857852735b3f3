"""How each law is fitted: free numbers without bounds, the box where searches for them begin, what runs must have.

Positive amounts are exponentials of free numbers. Sizes are centred at the mean of their logarithms, without which a
term's amount and its exponent could hardly be told apart; the interaction of `inference_optimal` alone must not be.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from softmoe_cli.scaling.laws import LAWS, Law, Number

Free = Mapping[str, Number]
"""Free numbers by name."""
Box = dict[str, tuple[float, float]]

EXPONENT = (math.log(0.05), math.log(1.5))
TERM = (-4.0, 0.5)
"""Of the logarithm of a term at the centre, above the logarithm of the mean loss."""
FLOOR = (-2.0, -0.05)
SLOPE = (-0.3, 0.3)
START, MOST = (-2.0, 1.5), (math.log(30), math.log(500))
"""Of log(E_start - 1) and log(E_max - E_start)."""


@dataclass(frozen=True)
class Form:
    """One law as it is fitted.

    Attributes:
        law: what is fitted.
        box: free numbers, and between what they start; those of `scaled` are above the logarithm of the mean loss.
        scaled: free numbers that are logarithms of a part of the loss.
        coefficients: the law's, from free numbers and from the means of the sizes' logarithms.
        least: how many different values of each size the runs must have.
        shares: whether the law is one of an error share too.
        single: sizes that the law does not know and of which there must be one value, so that it can hold.
    """

    law: Law
    box: Box
    scaled: tuple[str, ...]
    coefficients: Callable[[Free, Mapping[str, float]], dict[str, Number]]
    least: Mapping[str, int]
    single: tuple[str, ...] = ()
    shares: bool = False


EXPERTS_NEED = {"log_start": 4, "log_most": 5}
"""Different numbers of experts with which E_start and E_max are fitted. With fewer than five nothing is seen to
saturate, and E_max is infinite; with fewer than four E_start is 1."""


STEEP, HUGE = math.log(20), math.log(1e9)
"""The logarithms of the largest exponent and of the largest number: beyond them nothing changes but that numbers
overflow."""


def _bounded(logarithm: Number, most: float) -> Number:
    return np.exp(np.where(np.real(logarithm) > most, most, logarithm))


def _exponent(logarithm: Number) -> Number:
    return _bounded(logarithm, STEEP)


def _experts(free: Free) -> dict[str, Number]:
    start = 1 + _bounded(free["log_start"], HUGE) if "log_start" in free else 1.0
    return {"E_start": start, "E_max": start + _bounded(free["log_most"], HUGE) if "log_most" in free else math.inf}


def _inference_optimal(free: Free, centre: Mapping[str, float]) -> dict[str, Number]:
    alpha, beta, gamma = (_exponent(free[f"log_{name}"]) for name in ("alpha", "beta", "gamma"))
    return {
        "A": np.exp(free["log_A"] + alpha * centre["N"]), "alpha": alpha, "B": np.exp(free["log_B"]), "beta": beta,
        "C": np.exp(free["log_C"] + gamma * centre["D"]), "gamma": gamma, "F": np.exp(free["log_F"]), "d": free["d"],
        **_experts(free),
    }  # fmt: skip


def _joint_moe(free: Free, centre: Mapping[str, float]) -> dict[str, Number]:
    """`delta` and `omega` are those at the centre: the law's follow from them."""
    alpha, beta = -_exponent(free["log_alpha"]), -_exponent(free["log_beta"])
    return {
        "a": np.exp(free["log_a"] - alpha * centre["N_act"]), "alpha": alpha, "gamma": free["gamma"],
        "delta": free["delta"] - free["gamma"] * centre["N_act"],
        "b": np.exp(free["log_b"] - beta * centre["D"]), "beta": beta, "zeta": free["zeta"],
        "omega": free["omega"] - free["zeta"] * centre["D"], "c": np.exp(free["log_c"]), **_experts(free),
    }  # fmt: skip


def _routed_bilinear(free: Free, centre: Mapping[str, float]) -> dict[str, Number]:
    """`a`, `b` and `level` are those at the centre."""
    middle = centre["N"] / math.log(10)
    return {
        "a": free["a"], "b": free["b"] - free["c"] * middle, "c": free["c"],
        "d": free["log_level"] / math.log(10) - free["a"] * middle, **_experts(free),
    }  # fmt: skip


def _granular_moe(free: Free, centre: Mapping[str, float]) -> dict[str, Number]:
    alpha, beta = _exponent(free["log_alpha"]), _exponent(free["log_beta"])
    return {
        "a": np.exp(free["log_a"] + alpha * centre["N_total"]), "alpha": alpha,
        "g": np.exp(free["log_g"] + alpha * centre["N_total"]), "gamma": _exponent(free["log_gamma"]),
        "b": np.exp(free["log_b"] + beta * centre["D"]), "beta": beta, "c": np.exp(free["log_c"]),
    }  # fmt: skip


def _sparsity(free: Free, centre: Mapping[str, float]) -> dict[str, Number]:
    alpha, beta, gamma = (_exponent(free[f"log_{name}"]) for name in ("alpha", "beta", "gamma"))
    return {
        "a": np.exp(free["log_a"] + alpha * centre["N_total"]), "alpha": alpha,
        "b": np.exp(free["log_b"] + beta * centre["D"]), "beta": beta, "c": np.exp(free["log_c"]),
        "lambda_": -_exponent(free["log_lambda"]), "d": np.exp(free["log_d"] + gamma * centre["N_total"]),
        "delta": free["delta"], "gamma": gamma, "e": np.exp(free["log_e"]),
    }  # fmt: skip


def _chinchilla(free: Free, centre: Mapping[str, float]) -> dict[str, Number]:
    alpha, beta = _exponent(free["log_alpha"]), _exponent(free["log_beta"])
    return {
        "A": np.exp(free["log_A"] + alpha * centre["N"]), "alpha": alpha,
        "B": np.exp(free["log_B"] + beta * centre["D"]), "beta": beta, "F": np.exp(free["log_F"]),
    }  # fmt: skip


def _data_constrained(free: Free, centre: Mapping[str, float]) -> dict[str, Number]:
    return _chinchilla(free, centre) | {"R_star": _bounded(free["log_R"], HUGE)}


def _saturating_compute(free: Free, centre: Mapping[str, float]) -> dict[str, Number]:
    b, d = _exponent(free["log_b"]), np.exp(free["log_d"] + centre["C"])
    middle = math.exp(centre["C"]) + d
    return {"a": np.exp(free["log_a"]) * middle**b, "b": b, "c": np.exp(free["log_c"]), "d": d}


def _shape(free: Free, centre: Mapping[str, float]) -> dict[str, Number]:
    c = _exponent(free["log_c"])
    at_centre = np.exp(c * centre["C"])
    return {
        "alpha": np.exp(free["log_alpha"]), "a": _exponent(free["log_a"]), "beta": np.exp(free["log_beta"]) * at_centre,
        "b": _exponent(free["log_b"]), "xi": np.exp(free["log_xi"]) * at_centre, "c": c, "eps": np.exp(free["log_eps"]),
    }  # fmt: skip


EXPERTS: Box = {"log_start": START, "log_most": MOST}

FORMS = {
    form.law.name: form
    for form in (
        Form(LAWS["inference_optimal"],
             {"log_A": TERM, "log_alpha": EXPONENT, "log_B": TERM, "log_beta": EXPONENT, "log_C": TERM,
              "log_gamma": EXPONENT, "log_F": FLOOR, "d": (-0.02, 0.02), **EXPERTS},
             ("log_A", "log_B", "log_C", "log_F"), _inference_optimal, {"N": 3, "D": 3, "E": 3}),
        Form(LAWS["joint_moe"],
             {"log_a": TERM, "log_alpha": EXPONENT, "delta": SLOPE, "gamma": (-0.1, 0.1), "log_b": TERM,
              "log_beta": EXPONENT, "omega": SLOPE, "zeta": (-0.1, 0.1), "log_c": FLOOR, **EXPERTS},
             ("log_a", "log_b", "log_c"), _joint_moe, {"N_act": 3, "D": 3, "E": 3}),
        Form(LAWS["routed_bilinear"],
             {"a": SLOPE, "b": SLOPE, "c": (-0.1, 0.1), "log_level": (-0.5, 0.5), **EXPERTS},
             ("log_level",), _routed_bilinear, {"N": 3, "E": 3}, ("D",)),
        Form(LAWS["granular_moe"],
             {"log_a": TERM, "log_alpha": EXPONENT, "log_g": TERM, "log_gamma": EXPONENT, "log_b": TERM,
              "log_beta": EXPONENT, "log_c": FLOOR},
             ("log_a", "log_g", "log_b", "log_c"), _granular_moe, {"N_total": 3, "D": 3, "G": 3}),
        Form(LAWS["sparsity"],
             {"log_a": TERM, "log_alpha": EXPONENT, "log_b": TERM, "log_beta": EXPONENT, "log_c": TERM,
              "log_lambda": EXPONENT, "log_d": TERM, "delta": SLOPE, "log_gamma": EXPONENT, "log_e": FLOOR},
             ("log_a", "log_b", "log_c", "log_d", "log_e"), _sparsity, {"N_total": 3, "D": 3, "S": 3}),
        Form(LAWS["chinchilla"],
             {"log_A": TERM, "log_alpha": EXPONENT, "log_B": TERM, "log_beta": EXPONENT, "log_F": FLOOR},
             ("log_A", "log_B", "log_F"), _chinchilla, {"N": 3, "D": 3}),
        Form(LAWS["data_constrained"],
             {"log_A": TERM, "log_alpha": EXPONENT, "log_B": TERM, "log_beta": EXPONENT, "log_F": FLOOR,
              "log_R": (math.log(1), math.log(50))},
             ("log_A", "log_B", "log_F"), _data_constrained, {"N": 3, "D": 4}),
        Form(LAWS["saturating_compute"],
             {"log_a": TERM, "log_b": EXPONENT, "log_c": FLOOR, "log_d": (-6.0, 0.0)},
             ("log_a", "log_c"), _saturating_compute, {"C": 5}, shares=True),
        Form(LAWS["shape"],
             {"log_alpha": TERM, "log_a": EXPONENT, "log_beta": TERM, "log_b": EXPONENT, "log_xi": TERM,
              "log_c": EXPONENT, "log_eps": FLOOR},
             ("log_alpha", "log_beta", "log_xi", "log_eps"), _shape, {"E": 4, "C": 4}),
    )
}  # fmt: skip
"""Every law as it is fitted."""


def held_at(chance: float) -> Form:
    """The form of `saturating_compute` whose error without compute is that of guessing: a follows from the others."""

    def coefficients(free: Free, centre: Mapping[str, float]) -> dict[str, Number]:
        b, c, d = _exponent(free["log_b"]), chance / (1 + np.exp(-free["logit_c"])), np.exp(free["log_d"] + centre["C"])
        return {"a": (chance - c) * d**b, "b": b, "c": c, "d": d}

    box = {"log_b": EXPONENT, "logit_c": (-4.0, 1.0), "log_d": (-12.0, 0.0)}
    return Form(LAWS["saturating_compute"], box, (), coefficients, {"C": 4}, shares=True)
