"""Scaling laws as pure functions of sizes and coefficients, each with its source and the meaning of its letters.

One legend for sizes, which every function takes as numbers or arrays:

    N        parameters of the dense model of the same depth and width, without embeddings, head and router
    N_act    active parameters of a token, embeddings included
    N_total  all parameters
    D        training images (the papers: tokens)
    U        different training images that there are; D is more than U where they come again
    E        experts of an MoE layer; a dense model has 1
    G        granularity: how many times narrower an expert is than the MLP that it replaces
    S        sparsity: the share of the experts that a token does not use
    C        training compute

What a law returns is a loss in nats, or an error as a share of 1 where its text says so. Exponents of natural numbers
are natural logarithms unless a function says base 10. Every function takes complex coefficients too, so that fit.py
has exact derivatives of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Number = Any
"""A number, or an array of numbers."""


def e_hat(E: Number, E_start: Number, E_max: Number) -> Number:
    """The number of experts that still help: E_start for a dense model, at most E_max (Clark et al., Unified Scaling
    Laws for Routed Language Models, 2022, arXiv 2202.01169). With E_max infinite it is E - 1 + E_start."""
    return 1 / (1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max)


def inference_optimal(
    N: Number, D: Number, E: Number, *, A: Number, alpha: Number, B: Number, beta: Number, C: Number, gamma: Number,
    F: Number, d: Number, E_start: Number, E_max: Number,
) -> Number:  # fmt: skip
    """Yun et al., Toward Inference-optimal Mixture-of-Expert Large Language Models, 2024, arXiv 2404.02852, equation 4:

    log L = log(A / N^alpha + B / e^beta + C / D^gamma + F) + d log N log e, with e = e_hat(E).

    The paper does not say the base of the logarithm and gives no coefficients; here it is natural. Two weaknesses: N
    must be counted in parameters, because no coefficient can absorb another unit of it; and with d above 0 the loss
    grows without bound as N does. It interpolates.
    """
    e = e_hat(E, E_start, E_max)
    return (A * N**-alpha + B * e**-beta + C * D**-gamma + F) * np.exp(d * np.log(N) * np.log(e))


def routed_bilinear(
    N: Number, E: Number, *, a: Number, b: Number, c: Number, d: Number, E_start: Number, E_max: Number
) -> Number:
    """Clark et al., 2022, arXiv 2202.01169: log L = a log N + b log e + c log N log e + d, all to base 10, with e =
    e_hat(E). The number of tokens is not in it: all runs must have one."""
    log_n, log_e = np.log10(N), np.log10(e_hat(E, E_start, E_max))
    return 10 ** (a * log_n + b * log_e + c * log_n * log_e + d)


def effective_parameters(
    N: Number, E: Number, *, a: Number, b: Number, c: Number, d: Number, E_start: Number, E_max: Number
) -> Number:
    """Parameters of the dense model with the loss of N parameters and E experts, by the law of Clark et al.: it solves
    L(result, 1) = L(N, E). `d`, which is in both, does not change it."""
    del d
    e = e_hat(E, E_start, E_max)
    dense = a + c * np.log10(E_start)
    return N ** ((a + c * np.log10(e)) / dense) * (e / E_start) ** (b / dense)


def granular_moe(
    N_total: Number, D: Number, G: Number, *, a: Number, alpha: Number, b: Number, beta: Number, g: Number,
    gamma: Number, c: Number,
) -> Number:  # fmt: skip
    """Krajewski et al., Scaling Laws for Fine-Grained Mixture of Experts, 2024, arXiv 2402.07871, equation 9:
    L = c + (g / G^gamma + a) / N_total^alpha + b / D^beta. All their models have 64 times as many parameters in experts
    as a token uses, so that the number of experts is not in it. N_total is without embeddings."""
    return c + (g * G**-gamma + a) * N_total**-alpha + b * D**-beta


def sparsity(
    N_total: Number, D: Number, S: Number, *, a: Number, alpha: Number, b: Number, beta: Number, c: Number,
    lambda_: Number, d: Number, delta: Number, gamma: Number, e: Number,
) -> Number:  # fmt: skip
    """Abnar et al., Parameters vs FLOPs: Scaling Laws for Optimal Sparsity for Mixture-of-Experts Language Models,
    2025, arXiv 2501.12370: L = a / N^alpha + b / D^beta + c / (1 - S)^lambda + d / ((1 - S)^delta N^gamma) + e, N all
    parameters; lambda is below 0. Soft MoE has a place in it: 1 - S is the slots per token over the experts."""
    used = 1 - S
    return (
        a * N_total**-alpha
        + b * D**-beta
        + c * used**-lambda_
        + d * used**-delta * N_total**-gamma
        + e
    )  # fmt: skip


def joint_moe(
    N_act: Number, D: Number, E: Number, *, a: Number, alpha: Number, delta: Number, gamma: Number, b: Number,
    beta: Number, omega: Number, zeta: Number, E_start: Number, E_max: Number, c: Number,
) -> Number:  # fmt: skip
    """Ludziejewski et al., Joint MoE Scaling Laws: Mixture of Experts Can Be Memory Efficient, 2025, arXiv 2502.05172,
    equation 6: L = a e^delta N^(alpha + gamma ln e) + b e^omega D^(beta + zeta ln e) + c, e = e_hat(E), N = N_act.
    alpha and beta are negative numbers."""
    m, mu, n, nu = joint_reduced(E, a, alpha, delta, gamma, b, beta, omega, zeta, E_start, E_max)
    return m * N_act**mu + n * D**nu + c


def joint_reduced(
    E: Number, a: Number, alpha: Number, delta: Number, gamma: Number, b: Number, beta: Number, omega: Number,
    zeta: Number, E_start: Number, E_max: Number,
) -> tuple[Number, Number, Number, Number]:  # fmt: skip
    """m, mu, n, nu of the joint law at one number of experts, where it is m N^mu + n D^nu + c (their Table 4)."""
    log_e = np.log(e_hat(E, E_start, E_max))
    return a * np.exp(delta * log_e), alpha + gamma * log_e, b * np.exp(omega * log_e), beta + zeta * log_e


def joint_optimum(
    budget: Number, m: Number, mu: Number, n: Number, nu: Number, flop: float = 6.0
) -> tuple[Number, Number]:
    """N_act and D with the least loss for flop N D = budget (Hoffmann et al., Training Compute-Optimal Large Language
    Models, 2022, arXiv 2203.15556, closed form). mu and nu are negative, and Hoffmann's formula takes their sizes: with
    the signs of equation 7 in the joint law's paper the optimum would come out inverted."""
    alpha, beta = -mu, -nu
    g = (alpha * m / (beta * n)) ** (1 / (alpha + beta))
    return g * (budget / flop) ** (beta / (alpha + beta)), (budget / flop) ** (alpha / (alpha + beta)) / g


def chinchilla(
    N: Number, D: Number, *, A: Number, alpha: Number, B: Number, beta: Number, F: Number
) -> Number:  # fmt: skip
    """Hoffmann et al., 2022, arXiv 2203.15556: L = F + A / N^alpha + B / D^beta (their E is F here). It knows no
    experts: what a law of experts must beat."""
    return F + A * N**-alpha + B * D**-beta


def fresh_images(D: Number, U: Number, R_star: Number) -> Number:
    """Fresh images that are worth as much as D images of which U are different (Muennighoff et al., Scaling
    Data-Constrained Language Models, 2023, arXiv 2305.16264): u + u R* (1 - exp(-(r - 1) / R*)), u the different images
    that were seen and r = D / u how often each was."""
    u = np.minimum(D, U)
    return u + u * R_star * (1 - np.exp(-(D / u - 1) / R_star))


def data_constrained(
    N: Number, D: Number, U: Number, *, A: Number, alpha: Number, B: Number, beta: Number, F: Number, R_star: Number
) -> Number:
    """Muennighoff et al., 2023, arXiv 2305.16264, with repeated images only: Hoffmann's law of `fresh_images`. Each
    image that comes again is worth less than the time before; R* says how fast."""
    return chinchilla(N, fresh_images(D, U, R_star), A=A, alpha=alpha, B=B, beta=beta, F=F)


def saturating_compute(C: Number, *, a: Number, b: Number, c: Number, d: Number) -> Number:
    """Zhai et al., Scaling Vision Transformers, 2021, arXiv 2106.04560: an error as a share, a (C + d)^-b + c, along
    the best models of each compute. c cannot be trained away; d holds the error at what guessing has where there is
    little compute."""
    return a * (C + d) ** -b + c


def chance_held(C: Number, *, a: Number, b: Number, c: Number, chance: float) -> Number:
    """`saturating_compute` whose error without compute is `chance`, the error of guessing: d follows from it."""
    d = ((chance - c) / a) ** (-1 / b)
    return saturating_compute(C, a=a, b=b, c=c, d=d)


def shape(
    x: Number, t: Number, *, alpha: Number, a: Number, beta: Number, b: Number, xi: Number, c: Number, eps: Number
) -> Number:
    """Alabdulmohsin et al., Getting ViT in Shape, 2023, arXiv 2305.13035, equation 2, for one dimension x of a model
    (width, depth, or the number of experts) and compute t: alpha x^-a + (beta x^b + xi) t^-c + eps."""
    return alpha * x**-a + (beta * x**b + xi) * t**-c + eps


def best_x(
    t: Number, *, alpha: Number, a: Number, beta: Number, b: Number, xi: Number, c: Number, eps: Number
) -> Number:
    """The x with the least loss by the shape law at compute t; it grows as t^(c / (a + b)), whatever xi and eps."""
    del xi, eps
    return (alpha * a * t**c / (beta * b)) ** (1 / (a + b))


@dataclass(frozen=True)
class Law:
    """A law by name: its function, which sizes it takes in order, the names of its coefficients, and its source."""

    name: str
    of: Callable[..., Number]
    sizes: tuple[str, ...]
    coefficients: tuple[str, ...]
    formula: str
    source: str


LAWS = {
    law.name: law
    for law in (
        Law("inference_optimal", inference_optimal, ("N", "D", "E"),
            ("A", "alpha", "B", "beta", "C", "gamma", "F", "d", "E_start", "E_max"),
            "(A/N^alpha + B/e^beta + C/D^gamma + F) e^(d ln N)", "Yun et al. 2024, arXiv 2404.02852"),
        Law("joint_moe", joint_moe, ("N_act", "D", "E"),
            ("a", "alpha", "delta", "gamma", "b", "beta", "omega", "zeta", "E_start", "E_max", "c"),
            "a e^delta N^(alpha + gamma ln e) + b e^omega D^(beta + zeta ln e) + c",
            "Ludziejewski et al. 2025, arXiv 2502.05172"),
        Law("routed_bilinear", routed_bilinear, ("N", "E"), ("a", "b", "c", "d", "E_start", "E_max"),
            "10^(a lg N + b lg e + c lg N lg e + d)", "Clark et al. 2022, arXiv 2202.01169"),
        Law("granular_moe", granular_moe, ("N_total", "D", "G"), ("a", "alpha", "b", "beta", "g", "gamma", "c"),
            "c + (g/G^gamma + a)/N^alpha + b/D^beta", "Krajewski et al. 2024, arXiv 2402.07871"),
        Law("sparsity", sparsity, ("N_total", "D", "S"),
            ("a", "alpha", "b", "beta", "c", "lambda_", "d", "delta", "gamma", "e"),
            "a/N^alpha + b/D^beta + c/(1-S)^lambda + d/((1-S)^delta N^gamma) + e",
            "Abnar et al. 2025, arXiv 2501.12370"),
        Law("chinchilla", chinchilla, ("N", "D"), ("A", "alpha", "B", "beta", "F"),
            "F + A/N^alpha + B/D^beta", "Hoffmann et al. 2022, arXiv 2203.15556"),
        Law("data_constrained", data_constrained, ("N", "D", "U"), ("A", "alpha", "B", "beta", "F", "R_star"),
            "F + A/N^alpha + B/fresh(D)^beta", "Muennighoff et al. 2023, arXiv 2305.16264"),
        Law("saturating_compute", saturating_compute, ("C",), ("a", "b", "c", "d"),
            "a (C + d)^-b + c", "Zhai et al. 2021, arXiv 2106.04560"),
        Law("shape", shape, ("E", "C"), ("alpha", "a", "beta", "b", "xi", "c", "eps"),
            "alpha E^-a + (beta E^b + xi) C^-c + eps", "Alabdulmohsin et al. 2023, arXiv 2305.13035"),
    )
}  # fmt: skip
"""Every law that can be fitted."""
