"""Slow, plain float64 versions of the mathematics, written from the papers' formulas and sharing no code with the
package; and the composition of a configuration, which several files need."""

import copy
import functools
import math
from dataclasses import dataclass

from softmoe_cli.config.run import Config
from softmoe_cli.options import compose as composing

Vector = list[float]
Matrix = list[Vector]
Cube = list[Matrix]


def softmax(values: Vector) -> Vector:
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def unit(vector: Vector) -> Vector:
    """v / sqrt(|v|^2 + 1e-6)."""
    root = math.sqrt(sum(value * value for value in vector) + 1e-6)
    return [value / root for value in vector]


def gelu_tanh(v: float) -> float:
    return 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def mlp(x: Vector, w1: Matrix, b1: Vector, w2: Matrix, b2: Vector) -> Vector:
    """w1 is d h and w2 is h d; x @ w1 + b1, GELU, @ w2 + b2."""
    hidden = [gelu_tanh(b1[j] + sum(x[i] * w1[i][j] for i in range(len(x)))) for j in range(len(b1))]
    return [b2[j] + sum(hidden[i] * w2[i][j] for i in range(len(hidden))) for j in range(len(b2))]


@dataclass
class SoftMoE:
    """The numbers of one image: dispatch[s][e][p], combine[s][e][p], slots[e][p], outputs[e][p] and y[s]."""

    dispatch: Cube
    combine: Cube
    slots: Cube
    outputs: Cube
    y: Matrix


def soft_moe(x: Matrix, phi: Cube, scale: float, w1: Cube, b1: Matrix, w2: Cube, b2: Matrix) -> SoftMoE:
    """Soft MoE of one image: x[s][d], phi[d][e][p], and per expert w1[e][d][h], b1[e][h], w2[e][h][d], b2[e][d]."""
    n, d, e, p = len(x), len(phi), len(phi[0]), len(phi[0][0])
    tokens = [unit(token) for token in x]
    where = [(i, j) for i in range(e) for j in range(p)]
    slot_vectors = {(i, j): unit([phi[k][i][j] for k in range(d)]) for i, j in where}
    logits = {
        (s, i, j): scale * sum(a * b for a, b in zip(tokens[s], slot_vectors[i, j], strict=True))
        for s in range(n)
        for i, j in where
    }
    dispatch: Cube = [[[0.0] * p for _ in range(e)] for _ in range(n)]
    combine: Cube = [[[0.0] * p for _ in range(e)] for _ in range(n)]
    for i, j in where:
        for s, share in enumerate(softmax([logits[s, i, j] for s in range(n)])):
            dispatch[s][i][j] = share
    for s in range(n):
        for (i, j), share in zip(where, softmax([logits[s, i, j] for i, j in where]), strict=True):
            combine[s][i][j] = share
    slots: Cube = [
        [[sum(dispatch[s][i][j] * x[s][k] for s in range(n)) for k in range(d)] for j in range(p)] for i in range(e)
    ]
    outputs: Cube = [[mlp(slots[i][j], w1[i], b1[i], w2[i], b2[i]) for j in range(p)] for i in range(e)]
    y = [[sum(combine[s][i][j] * outputs[i][j][k] for i, j in where) for k in range(d)] for s in range(n)]
    return SoftMoE(dispatch, combine, slots, outputs, y)


def adamw(start: float, gradients: Vector, rates: Vector, *, decay: float, betas: Vector, eps: float) -> Vector:
    """One weight under AdamW with decoupled decay (Loshchilov and Hutter, Algorithm 2): its value after each step."""
    weight, first, second, path = start, 0.0, 0.0, []
    for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        first = betas[0] * first + (1 - betas[0]) * g
        second = betas[1] * second + (1 - betas[1]) * g * g
        step = (first / (1 - betas[0] ** t)) / (math.sqrt(second / (1 - betas[1] ** t)) + eps)
        weight = weight - lr * step - lr * decay * weight
        path.append(weight)
    return path


def compose(*overrides: str) -> Config:
    """The checked configuration that `softmoe train OVERRIDES` would run."""
    return copy.deepcopy(_composed(*overrides))


_composed = functools.cache(composing.compose)


@dataclass
class Placed:
    """One token in one slot: kept[(expert, position)] = (token, gate); demand counts askers, dropped ones included."""

    kept: dict[tuple[int, int], tuple[int, float]]
    demand: list[int]


def tokens_choice(gates: Matrix, scores: Matrix, k: int, slots: int, *, surest_first: bool) -> Placed:
    """V-MoE, Algorithms 1 and 2, for one group: gates[s][e] weigh, scores[s][e] choose."""
    s, e = len(gates), len(gates[0])
    choices = [sorted(range(e), key=lambda i: (-scores[t][i], i))[:k] for t in range(s)]
    order = sorted(range(s), key=lambda t: (-max(gates[t]), t)) if surest_first else list(range(s))
    placed = Placed({}, [0] * e)
    for rank in range(k):
        for t in order:
            expert = choices[t][rank]
            if placed.demand[expert] < slots:
                placed.kept[expert, placed.demand[expert]] = (t, gates[t][expert])
            placed.demand[expert] += 1
    return placed


def experts_choice(gates: Matrix, slots: int) -> Placed:
    """Zhou et al., Section 3.2, for one group, with a softmax over experts and no renormalisation."""
    s, e = len(gates), len(gates[0])
    placed = Placed({}, [slots] * e)
    for expert in range(e):
        for position, t in enumerate(sorted(range(s), key=lambda t: (-gates[t][expert], t))[:slots]):
            placed.kept[expert, position] = (t, gates[t][expert])
    return placed


def sparse_moe(x: Matrix, placed: Placed, w1: Cube, b1: Matrix, w2: Cube, b2: Matrix) -> Matrix:
    """The outputs of one group's tokens: sums of gate times expert."""
    y = [[0.0] * len(x[0]) for _ in x]
    for (expert, _), (t, gate) in placed.kept.items():
        out = mlp(x[t], w1[expert], b1[expert], w2[expert], b2[expert])
        y[t] = [old + gate * new for old, new in zip(y[t], out, strict=True)]
    return y


def squared_variation(values: Vector) -> float:
    """(population standard deviation / mean)^2"""
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values) / mean**2


def importance_loss(gates: Matrix) -> float:
    """V-MoE, Appendix A.2, equation 6."""
    return squared_variation([sum(column) for column in zip(*gates, strict=True)])


def load_loss(clean: Matrix, noisy: Matrix, std: float, k: int) -> float:
    """V-MoE, Appendix A.2, equations 7 to 9: the chance to be among the k best with the noise drawn again."""
    chances = []
    for quiet, loud in zip(clean, noisy, strict=True):
        threshold = sorted(loud, reverse=True)[k - 1]
        chances.append([0.5 * math.erfc((threshold - logit) / std / math.sqrt(2)) for logit in quiet])
    return squared_variation([sum(column) / len(clean) for column in zip(*chances, strict=True)])


def gshard_loss(gates: Matrix) -> float:
    """GShard, Algorithm 1: e times the sum over experts of share of first choices times mean gate."""
    s, e = len(gates), len(gates[0])
    firsts = [max(range(e), key=lambda i: (row[i], -i)) for row in gates]
    return e * sum(firsts.count(i) / s * sum(row[i] for row in gates) / s for i in range(e))


def solve(matrix: Matrix, right: Vector) -> Vector:
    """Gauss-Jordan elimination with the largest pivot."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        pivot = max(range(i, len(rows)), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for r in range(len(rows)):
            if r != i:
                rows[r] = [a - rows[r][i] * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [row[-1] for row in rows]


def ridge(x: Matrix, labels: list[int], classes: int, l2: float) -> Matrix:
    """Weights [d][c] of (X^T X + l2 I) w = X^T y, with y 1 for an image's class and -1 for the others."""
    d = len(x[0])
    square = [[sum(row[i] * row[j] for row in x) + (l2 if i == j else 0.0) for j in range(d)] for i in range(d)]
    columns = []
    for c in range(classes):
        y = [1.0 if label == c else -1.0 for label in labels]
        columns.append(solve(square, [sum(row[i] * v for row, v in zip(x, y, strict=True)) for i in range(d)]))
    return [list(row) for row in zip(*columns, strict=True)]


def calibration_error(probabilities: Vector, right: list[bool], bins: int) -> float:
    """Guo et al., 2017, equation 3: bins ((m - 1) / bins, m / bins], each weighted with its share of images."""
    error = 0.0
    for m in range(bins):
        members = [i for i, p in enumerate(probabilities) if m / bins < p <= (m + 1) / bins]
        if members:
            accuracy = sum(right[i] for i in members) / len(members)
            confidence = sum(probabilities[i] for i in members) / len(members)
            error += len(members) / len(probabilities) * abs(accuracy - confidence)
    return error
