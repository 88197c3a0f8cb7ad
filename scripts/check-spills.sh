#!/usr/bin/env bash
# Looks at the machine code of the register tile's inner loops: nothing in them may go through the stack.
#
#     scripts/check-spills.sh [PROGRAM]
#
# The tile (crates/gemm/src/tile.rs) is fast because its accumulators never leave the vector registers. Nothing in the
# source can promise that: the register allocator decides, anew with every compiler and every change around the loop. So
# this script builds benches' `measure`, which holds the kernels of attention and of the products, disassembles it and
# looks at every innermost loop with at least 24 fused multiply-adds in it (four steps of k of a tile of three rows or
# more). It prints them and fails where a vector goes to or comes from the stack, or something is called.
#
# PROGRAM: a program built already, with `-C symbol-mangling-version=v0` (so that the names of kernels tell their type
# parameters, and with them the crate that they belong to) and not stripped.
#
# Exit codes: 0 all loops are clean, 1 a spill, a call, or no such loop where one must be, 2 it could not be checked
# (no objdump or python3, another architecture than x86-64, the build failed).
set -euo pipefail

cannot() {
    echo "check-spills: $1" >&2
    exit 2
}

[ $# -le 1 ] || cannot "expected at most one argument, a program"
[ "$(uname -m)" = x86_64 ] || cannot "knows the machine code of x86-64 only, this is $(uname -m)"
command -v objdump >/dev/null || cannot "objdump is missing (it comes with binutils)"
command -v python3 >/dev/null || cannot "python3 is missing"

if [ $# -eq 1 ]; then
    program=$1
    [ -r "$program" ] || cannot "cannot read $program"
else
    cd "$(dirname "$0")/.."
    # A folder of its own: with other flags everything is compiled anew, and back again for the next plain build.
    target=${CARGO_TARGET_DIR:-target}/spills
    RUSTFLAGS="${RUSTFLAGS:-} -C symbol-mangling-version=v0" \
        cargo build --quiet --release --package qkv-benches --bin measure --target-dir "$target" ||
        cannot "the build failed"
    program=$target/release/measure
fi

listing=$(mktemp)
trap 'rm -f "$listing"' EXIT
objdump --disassemble --demangle --no-show-raw-insn "$program" >"$listing" || cannot "objdump cannot read $program"

python3 - "$listing" <<'PYTHON'
import re
import sys
from collections import Counter

LEAST_FMAS = 24
# The full tile: four steps of k, 6 rows, 2 vectors. Each crate must have one.
FULL_TILE_FMAS = 4 * 6 * 2
# A kernel is instantiated in the trampoline that enters an instruction set; its type parameters say whose it is. The
# attention crate comes first: its kernels pass through types of the gemm crate.
OWNERS = ["qkv_attention", "qkv_gemm"]
# Not a product: soft cap, ALiBi and rules over scores that lie in L1.
PASS = "score_ops::ScorePass"

FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
INSTRUCTION = re.compile(r"^\s*([0-9a-f]+):\t(\S+)\s*(.*)$")
JUMP = re.compile(r"^j\w+$")
FMA = re.compile(r"^vf(n?m(add|sub))(132|213|231)ps$")
VECTOR = re.compile(r"%[xyz]mm\d")


def functions(path):
    """(name, [(address, mnemonic, operands)]) of each function."""
    name, body = None, []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if match := FUNCTION.match(line):
                if body:
                    yield name, body
                name, body = match[1], []
            elif match := INSTRUCTION.match(line):
                operands = match[3].split("#")[0]
                body.append((int(match[1], 16), match[2], operands))
    if body:
        yield name, body


def innermost_loops(body):
    """(first, last) indices of the instructions of each innermost loop: what a conditional jump back spans, if control
    runs through it from top to bottom. With a jump away in it, the span is no loop but code laid out that way."""
    index = {address: i for i, (address, _, _) in enumerate(body)}
    away = [i for i, (_, mnemonic, _) in enumerate(body) if mnemonic.startswith(("jmp", "ret", "ud2"))]
    spans = set()
    for i, (_, mnemonic, operands) in enumerate(body):
        if JUMP.match(mnemonic) and mnemonic != "jmp" and (target := re.match(r"([0-9a-f]+)\b", operands)):
            first = index.get(int(target[1], 16))
            if first is not None and first <= i and not any(first <= a <= i for a in away):
                spans.add((first, i))
    return [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]


def on_stack(body):
    """A test for operands in the function's stack frame: by %rsp, and by %rbp where that is the frame pointer."""
    framed = any(m == "mov" and o.replace(" ", "") == "%rsp,%rbp" for _, m, o in body[:20])
    pattern = re.compile(r"\((%rsp|%rbp)[,)]" if framed else r"\((%rsp)[,)]")
    return lambda operands: pattern.search(operands) is not None


def look(loop, stack):
    """What is in a loop."""
    found = Counter(instructions=len(loop))
    for _, mnemonic, operands in loop:
        vector = VECTOR.search(operands) is not None
        memory = "(" in operands
        if FMA.match(mnemonic):
            found["fma"] += 1
        if mnemonic.startswith("vbroadcast"):
            found["broadcasts"] += 1
        elif mnemonic.startswith("vmov") and vector:
            found["moves" if memory else "copies"] += 1
        if stack(operands):
            found["spills" if vector else "scalars"] += 1
        if mnemonic.startswith("call"):
            found["calls"] += 1
    return found


def main():
    bad, seen = 0, Counter()
    rows = Counter()
    for name, body in functions(sys.argv[1]):
        # The pass over a block's scores has as many multiply-adds in its polynomials, whose constants may lie on the stack.
        if PASS in name or sum(1 for _, m, _ in body if FMA.match(m)) < LEAST_FMAS:
            continue
        stack = on_stack(body)
        owner = next((o for o in OWNERS if o in name), "other")
        for first, last in innermost_loops(body):
            found = look(body[first : last + 1], stack)
            if found["fma"] < LEAST_FMAS:
                continue
            columns = ("fma", "broadcasts", "moves", "copies", "scalars", "spills", "calls", "instructions")
            rows[(owner, *(found[c] for c in columns))] += 1
            seen[owner] = max(seen[owner], found["fma"])
            if found["spills"] or found["calls"]:
                bad += 1
                print(f"{owner}: loop at {body[first][0]:x} in {name[:200]}")
                for address, mnemonic, operands in body[first : last + 1]:
                    if mnemonic.startswith("call") or stack(operands):
                        print(f"    {address:x}: {mnemonic} {operands}")
    head = ("loops", "crate", "FMAs", "broadcasts", "moves", "copies", "scalars", "spills", "calls", "instructions")
    print("".join(f"{h:>{max(6, len(h)) + 1}}" if h != "crate" else f"  {h:14}" for h in head))
    for (owner, *counts), number in sorted(rows.items()):
        cells = "".join(f"{c:>{max(6, len(h)) + 1}}" for c, h in zip(counts, head[2:]))
        print(f"{number:>7}  {owner:14}{cells}")
    print("moves: vectors to or from memory; copies: between registers; scalars: addresses and counters on the stack")
    for owner in OWNERS:
        if seen[owner] < FULL_TILE_FMAS:
            print(f"{owner}: no loop with the {FULL_TILE_FMAS} multiply-adds of a full tile")
            bad += 1
    print("clean" if not bad else f"{bad} found")
    sys.exit(1 if bad else 0)


main()
PYTHON
