#!/usr/bin/env python3
"""The constants of crates/simd/src/math.rs, remade.

Each polynomial is fitted in the form in which the code evaluates it: a weighted minimax fit (Remez exchange, weights in
ULPs of the float32 result), then float32 coefficients, each rounded in turn with the rest fitted anew. Where the
polynomial is long enough its error disappears beside the rounding of the evaluation and that is all. The short one of
exp2_nonpositive is not: there the neighbours of the rounded coefficients are tried as well, and the set is kept whose
largest error is smallest when evaluated in float32, with fused and with separate multiply-add.

Printed are Rust constants, and the largest errors found. Everything is deterministic.

    python3 scripts/fit_polynomials.py            # needs mpmath; half a minute
    python3 scripts/fit_polynomials.py --check    # and compares with math.rs: exit code 1 where they differ
"""

import itertools
import math
import pathlib
import re
import struct
import sys

from mpmath import erfc, expm1, log, lu_solve, matrix, mp, mpf, power

mp.prec = 120
SOURCE = pathlib.Path(__file__).resolve().parent.parent / "crates/simd/src/math.rs"


# ---------------------------------------------------------------------------------------------------------- float32


def f32(x):
    """The float32 nearest to x."""
    return struct.unpack("f", struct.pack("f", float(x)))[0]


def neighbour(x, steps):
    """The float32 that lies `steps` places above the positive float32 x."""
    return struct.unpack("f", struct.pack("I", struct.unpack("I", struct.pack("f", x))[0] + steps))[0]


def literal(x):
    """The shortest decimal that reads back as the float32 x."""
    for digits in range(9):
        text = f"{x:.{digits}e}"
        if f32(float(text)) == x:
            mantissa, exponent = text.split("e")
            return f"{mantissa}e{int(exponent)}"
    raise ValueError(x)


def rounded(x):
    """The float64 x to 24 bits, by Veltkamp's split: as float32 arithmetic would, away from its limits."""
    t = x * 536870913.0
    return t - (t - x)


def fused(a, b, c):
    # A product of two float32 is exact in float64. That the sum is rounded twice matters only beside exact ties.
    return rounded(a * b + c)


def separate(a, b, c):
    return rounded(rounded(a * b) + c)


# ------------------------------------------------------------------------------------------------------------- fits


def horner(coefficients, x):
    value = 0.0
    for c in reversed(coefficients):
        value = value * x + c
    return value


class Problem:
    """Minimise max |weight(x) (p(x) - target(x))| over the grid: the values of both are kept as float64, whose errors
    are 2^-29 of the float32 ULPs that the weights count."""

    def __init__(self, grid, target, weight, degree):
        self.grid = [float(x) for x in grid]
        self.target = [float(target(mpf(x))) for x in self.grid]
        self.weight = [float(weight(mpf(x))) for x in self.grid]
        self.degree = degree

    def error(self, coefficients):
        """The largest weighted error of p itself, its evaluation taken as exact."""
        points = zip(self.grid, self.target, self.weight)
        return max(abs(w * (horner(coefficients, x) - t)) for x, t, w in points)

    def remez(self, fixed=()):
        """The coefficients after the `fixed` lowest ones, by exchange of one node at a time.

        With k coefficients fixed, the rest is a polynomial approximation of (target - fixed part) / x^k with weight
        |x|^k weight: the grid must leave out 0."""
        k = len(fixed)
        grid, count = self.grid, self.degree + 2 - k
        weight = [w * abs(x) ** k for x, w in zip(grid, self.weight)]
        target = [(t - horner(fixed, x)) / x**k for x, t in zip(grid, self.target)]
        last = len(grid) - 1
        nodes = [round(last * (0.5 - 0.5 * math.cos(math.pi * (i + 0.5) / count))) for i in range(count)]
        best, best_error = None, math.inf
        for _ in range(60):
            a, b = matrix(count, count), matrix(count, 1)
            for row, i in enumerate(nodes):
                for j in range(count - 1):
                    a[row, j] = mpf(grid[i]) ** j * weight[i]
                a[row, count - 1] = (-1) ** row
                b[row] = mpf(target[i]) * weight[i]
            solution = lu_solve(a, b)
            coefficients, level = [float(c) for c in solution[: count - 1]], abs(float(solution[count - 1]))
            error = [w * (horner(coefficients, x) - t) for x, t, w in zip(grid, target, weight)]
            peak = max(range(last + 1), key=lambda i: abs(error[i]))
            if abs(error[peak]) < best_error:
                best, best_error = coefficients, abs(error[peak])
            if abs(error[peak]) <= 1.0005 * level:
                break
            # The peak takes the place of a neighbouring node whose error has the same sign, so signs still alternate.
            same = [(error[i] > 0) == (error[peak] > 0) for i in nodes]
            after = sum(i <= peak for i in nodes)
            if after == 0:
                nodes = [peak] + (nodes[1:] if same[0] else nodes[:-1])
            elif after == count:
                nodes = (nodes[:-1] if same[-1] else nodes[1:]) + [peak]
            else:
                nodes[after - 1 if same[after - 1] else after] = peak
        return best

    def fit(self, fixed=()):
        """All coefficients as float32, each rounded in turn with the rest fitted anew to what is left."""
        fixed = list(fixed)
        while len(fixed) <= self.degree:
            fixed.append(f32(self.remez(fixed)[0]))
        return fixed


def between(low, high, points, bend=1.0):
    """A grid without 0 (`points` is even where 0 is in the middle), denser at its upper end for bend > 1."""
    inner = ((i + 0.5) / points for i in range(points))
    return [low] + [high - (high - low) * (1 - t) ** bend for t in inner] + [high]


def binade(r):
    """1 / ULP of a result that lies in [0.5, 1) for r < 0 and in [1, 2) for r >= 0."""
    return mpf(2) ** (24 if r < 0 else 23)


# -------------------------------------------------------------------------------------------------------- functions


def exp2_error(q, step):
    """The largest error in ULPs of 2^r = 1 + r q(r) evaluated in float32, fused and separate. Between -1/2 and 1/2
    the arguments that the reduction leaves are multiples of 2^-24 (finer ones only beside 0): every `step`th."""
    worst = {fused: 0.0, separate: 0.0}
    c0, c1, c2, c3, c4 = q
    for i in itertools.chain(range(-(2**23), 2**23, step), [2**23]):
        r = i / 2**24
        exact, ulp = 2.0**r, 2.0 ** (-24 if i < 0 else -23)
        for multiply_add in worst:
            value = multiply_add(c4, r, c3)
            value = multiply_add(value, r, c2)
            value = multiply_add(value, r, c1)
            value = multiply_add(value, r, c0)
            error = abs(multiply_add(r, value, 1.0) - exact) / ulp
            if error > worst[multiply_add]:
                worst[multiply_add] = error
    return worst[fused], worst[separate]


def exp2_q():
    """2^r = 1 + r q(r), |r| <= 1/2, q of degree 4. The evaluation rounds more often below 1, in ULPs of there, so the
    fit leaves more of the error to the right side: how much more is part of the search."""
    candidates = {}
    for lean in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5):
        problem = Problem(
            between(-0.5, 0.5, 400),
            target=lambda r: (power(2, r) - 1) / r,
            weight=lambda r: abs(r) * binade(r) * (mpf(2) ** lean if r < 0 else 1),
            degree=4,
        )
        c0 = f32(problem.remez()[0])
        for step0 in range(-2, 3):
            one = [neighbour(c0, step0)]
            c1 = f32(problem.remez(one)[0])
            for step1 in range(-2, 3):
                two = one + [neighbour(c1, step1)]
                c2 = f32(problem.remez(two)[0])
                for step2 in range(-1, 2):
                    q = tuple(problem.fit(two + [neighbour(c2, step2)]))
                    candidates[q] = max(exp2_error(q, 4093))
    # Fewer and fewer candidates on more and more arguments.
    for keep, step in ((60, 509), (12, 61)):
        best = sorted(candidates, key=lambda q: (candidates[q], q))[:keep]
        candidates = {q: max(exp2_error(q, step)) for q in best}
    q = min(candidates, key=lambda q: (candidates[q], q))
    return q, "with its evaluation, %.2f ULP fused, %.2f ULP separate" % exp2_error(q, 61)


def exp_q():
    """e^r = 1 + r q(r), |r| <= ln 2 / 2 and a little for the rounding of the quotient, q of degree 5."""
    half = float(log(2) / 2) * (1 + 2**-14)
    problem = Problem(
        between(-half, half, 1000),
        target=lambda r: expm1(r) / r,
        weight=lambda r: abs(r) * binade(r),
        degree=5,
    )
    q = problem.fit()
    return q, f"alone, {problem.error(q):.3f} ULP"


def erf_p():
    """ln(1 - erf(-u)) = u + u p(u) on [-4, 0), p of degree 8: an error e in p is one of erfc(-u) u e in erf(-u)."""
    problem = Problem(
        between(-4.0, -1e-4, 1000, bend=1.5),
        target=lambda u: log(erfc(-u)) / u - 1,
        weight=lambda u: mpf(2) ** 24 * -u * erfc(-u) / (1 - erfc(-u)),
        degree=8,
    )
    p = problem.fit()
    return p, f"alone, {problem.error(p):.3f} x 2^-24 of erf"


def ln2_parts():
    """ln 2 as a sum of two float32, the first of 15 bits: its products with whole numbers up to 2^9 are exact."""
    high = round(math.ldexp(math.log(2), 15)) / 2**15
    return [high], [f32(log(2) - mpf(high))]


def main():
    high, low = ln2_parts()
    q2, q2_note = exp2_q()
    qe, qe_note = exp_q()
    pe, pe_note = erf_p()
    constants = {
        "EXP2_Q": (q2, q2_note),
        "LN2_HIGH": (high, "15 bits"),
        "LN2_LOW": (low, "the rest"),
        "EXP_Q": (qe, qe_note),
        "ERF_P": (pe, pe_note),
    }
    for name, (values, note) in constants.items():
        print(f"// {note}")
        if len(values) == 1:
            print(f"const {name}: f32 = {literal(values[0])};")
        else:
            print(f"const {name}: [f32; {len(values)}] = [{', '.join(map(literal, values))}];")
    if "--check" in sys.argv[1:]:
        source = SOURCE.read_text()
        for name, (values, _) in constants.items():
            found = re.search(rf"const {name}: [^=]*= ([^;]*);", source)
            numbers = re.findall(r"-?[0-9][0-9._]*(?:e-?[0-9]+)?", found[1]) if found else []
            if [f32(float(x.replace("_", ""))) for x in numbers] != list(values):
                sys.exit(f"{name} in {SOURCE.name} is not what comes out here")
        print(f"// {SOURCE.name} has the same", file=sys.stderr)


if __name__ == "__main__":
    main()
