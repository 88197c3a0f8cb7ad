#!/usr/bin/env python3
"""The constants of crates/simd/src/math.rs, remade.

Each polynomial is fitted in the form in which the code evaluates it: a weighted minimax fit (Remez exchange, weights in
ULPs of the float32 result), then float32 coefficients, each rounded in turn with the rest fitted anew. Where the
polynomial is long enough its error disappears beside the rounding of the evaluation and that is all. The short one of
exp2_nonpositive is not: there the neighbours of the rounded coefficients are tried as well, and the set is kept whose
largest error is smallest when evaluated in float32, with fused and with separate multiply-add.

Printed are Rust constants, and the largest errors found. Everything is deterministic.

    python3 scripts/fit_polynomials.py            # needs mpmath; about half a minute
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


def exp2_error(q, n, r):
    """The larger error in ULPs, of fused and separate evaluation in float32, of 2^n + (2^n r) q(r) for 2^(n + r)."""
    c0, c1, c2, c3, c4, c5 = q
    exact, ulp = 2.0**r, 2.0 ** (-24 if r < 0 else -23)
    value = separate(separate(separate(separate(separate(c5, r, c4), r, c3), r, c2), r, c1), r, c0)
    if n == 0:
        error = abs(separate(r, value, 1.0) - exact)
    else:
        # The product is subnormal, a multiple of 2^-149; 2^n times 1 and all else is as for n = 0.
        grid = 2.0 ** (149 + n)
        error = abs(rounded(round(r * value * grid) / grid + 1.0) - exact)
    value = fused(fused(fused(fused(fused(c5, r, c4), r, c3), r, c2), r, c1), r, c0)
    return max(error, abs(fused(r, value, 1.0) - exact)) / ulp


def exp2_arguments(step):
    """Pairs (n, r) to try exp2_error on. All octaves are alike, up to a power of two, but for the lowest two. So n = 0,
    with all floats r within 2^-9 of -1/2 and 1/2, where the error is largest, and every `step`th multiple of 2^-25
    between; and then all floats x in [-124.625, -124.375], multiples of 2^-17, where the product is subnormal at the
    very place where the error is large anyway."""
    end, near = 2**24, 2**24 - 2**16
    for i in itertools.chain(range(-end, -near), range(end, near, -2), range(-near, near, step)):
        yield 0, i / 2**25
    for i in range(-997 * 2**14, -995 * 2**14 + 1):
        n = round(i / 2**17)
        yield n, i / 2**17 - n


def exp2_q():
    """2^r = 1 + r q(r), |r| <= 1/2, q of degree 5. The evaluation rounds more often below 1, in ULPs of there, so the
    fit leaves more of the error to the right side: how much more is part of the search."""
    candidates = set()
    for lean in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        problem = Problem(
            between(-0.5, 0.5, 400),
            target=lambda r: (power(2, r) - 1) / r,
            weight=lambda r: abs(r) * binade(r) * (mpf(2) ** lean if r < 0 else 1),
            degree=5,
        )
        c0 = f32(problem.remez()[0])
        for step0 in range(-3, 4):
            one = [neighbour(c0, step0)]
            c1 = f32(problem.remez(one)[0])
            for step1 in range(-3, 4):
                two = one + [neighbour(c1, step1)]
                c2 = f32(problem.remez(two)[0])
                for step2 in range(-2, 3):
                    candidates.add(tuple(problem.fit(two + [neighbour(c2, step2)])))
    # A candidate is dropped at the first argument where it is no better than the best so far; such arguments come up
    # again and again, so the next ones are tried on them first.
    best, least, hard = None, math.inf, []
    for q in sorted(candidates):
        worst = 0.0
        for n, r in itertools.chain(hard, exp2_arguments(61)):
            worst = max(worst, exp2_error(q, n, r))
            if worst >= least:
                if (n, r) in hard:
                    hard.remove((n, r))
                hard.insert(0, (n, r))
                break
        else:
            best, least = q, worst
    return best, f"with its evaluation, on a sample, {least:.2f} ULP"


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
