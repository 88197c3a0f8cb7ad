"""What gemm_peers.py, attention_peers.py and python_peers.py share: timing several libraries side by side, fairly, on
few cores.

In the first two each peer lives in a subprocess of its own, so that OpenMP and BLAS runtimes never meet. It stays alive
for the whole run and is timed in turns: in every round each peer gets one stretch of at least `seconds`, and the order
rotates from round to round, so that a slow spell of the machine hits all alike. While it is not its turn a peer is
stopped by SIGSTOP: otherwise its idle worker threads, which spin for a while after each call, would eat the others'
cores. Before each timed stretch comes an untimed one, to bring threads and caches back. The result is the median of
rounds.

A subprocess is the same script, started with `--child NAME`. It says who it is in one line of JSON, or why it is
missing, and then answers each request (a line of JSON) with one line of JSON: "gflops", or "skipped" with a reason; and
"error" where it checked its result.

An external program may be a column too (--qkv PATH): it is run once per round and shape, with RAYON_NUM_THREADS set,
and the last word it prints is taken as GFLOP/s.

python_peers.py has its libraries in one process instead, and takes from here the turns (`alternate`), `stretch`, the
external program and the options.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time


def child_environment(threads, extra=None):
    """The environment of a timed process: N threads in every runtime, and OpenBLAS left to pick its own kernel."""
    env = dict(os.environ)
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        env.pop(name, None)
    for name in ("OMP", "OPENBLAS", "MKL", "BLIS", "RAYON"):
        env[f"{name}_NUM_THREADS"] = str(threads)
    env["MKL_DYNAMIC"] = "FALSE"
    env["OMP_DYNAMIC"] = "FALSE"
    env.update(extra or {})
    return env


class Child:
    """A peer in a subprocess; stopped between its turns."""

    def __init__(self, script, name, threads, extra_env=None):
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, script, "--child", name, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(threads, extra_env),
        )
        self.about = self._read()
        self.alive = "missing" not in self.about
        if self.alive:
            self._stop()
        else:
            self.close()

    def _read(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"missing": "its process ended"}

    def _stop(self):
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def time(self, case, seconds):
        """GFLOP/s of one stretch, or None where the peer cannot do the case."""
        if not self.alive:
            return None
        os.kill(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(json.dumps({"case": case, "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        answer = self._read()
        if "missing" in answer:
            self.alive = False
            self.about["died"] = f"in case {case}"
            return None
        self._stop()
        if "skipped" in answer:
            self.about.setdefault("skipped", {})[str(case)] = answer["skipped"]
        if "error" in answer:
            self.about["largest error"] = max(answer["error"], self.about.get("largest error", 0.0))
        return answer.get("gflops")

    def close(self):
        self.process.kill()
        self.process.wait()


class External:
    """A program that is started for every stretch and prints GFLOP/s as its last word."""

    def __init__(self, name, path, arguments, threads):
        self.name, self.path, self.arguments, self.env = name, path, arguments, child_environment(threads)
        self.alive = True
        self.about = {"version": os.path.basename(path)}

    def time(self, case, seconds):
        command = [self.path, *map(str, self.arguments(case)), "--seconds", str(seconds)]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True)
        try:
            return float(done.stdout.split()[-1])
        except (IndexError, ValueError):
            self.about.setdefault("skipped", {})[str(case)] = (done.stderr.strip() or "no number printed")[-200:]
            return None

    def close(self):
        pass


def stretch(call, seconds):
    """Seconds per call: an untimed stretch of a tenth (one call at least), then calls for at least `seconds`."""
    elapsed = 0.0
    for limit in (seconds / 10, seconds):
        count, start = 0, time.perf_counter()
        while True:
            call()
            count += 1
            elapsed = time.perf_counter() - start
            if elapsed >= limit:
                break
    return elapsed / count


def serve(about, answer):
    """The child's side: announce `about` (with "missing" to give up), then answer(case, seconds) -> dict."""
    # The protocol keeps the real stdout; whatever a library prints goes to stderr.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    pipe.write(json.dumps(about() if callable(about) else about) + "\n")
    pipe.flush()
    for line in sys.stdin:
        request = json.loads(line)
        pipe.write(json.dumps(answer(request["case"], request["seconds"])) + "\n")
        pipe.flush()


def alternate(peers, cases, rounds, seconds):
    """[for each case, {peer name: [rate in each round]}], a rate being what `peer.time` returns (GFLOP/s, or calls per
    second); progress goes to stderr when it is a terminal."""
    results = []
    for i, case in enumerate(cases):
        if sys.stderr.isatty():
            print(f"\r{i + 1}/{len(cases)} {case}\x1b[K", end="", file=sys.stderr, flush=True)
        times = {peer.name: [] for peer in peers}
        for turn in range(rounds):
            shift = turn % len(peers)
            for peer in peers[shift:] + peers[:shift]:
                if len(times[peer.name]) == turn:  # one that failed once is not asked again
                    rate = peer.time(case, seconds)
                    if rate is not None:
                        times[peer.name].append(rate)
        results.append(times)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    return results


def cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def add_timing_arguments(parser, seconds, only):
    """The options that all scripts have; `only` says what its --only picks."""
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=seconds, help="least length of one timed stretch")
    parser.add_argument("--only", help=f"{only}, by name, separated by commas")
    parser.add_argument("--json", action="store_true")


def add_arguments(parser):
    add_timing_arguments(parser, seconds=0.05, only="peers to time")
    parser.add_argument("--child", help=argparse.SUPPRESS)


def report(peers, cases, labels, results, args):
    """Prints the table of medians, or everything as JSON."""
    about = {peer.name: peer.about for peer in peers}
    if args.json:
        rows = []
        for case, times in zip(cases, results):
            medians = {name: statistics.median(t) for name, t in times.items() if t}
            rows.append({"case": case, "gflops": medians, "rounds": times})
        setting = {"cpu": cpu_name(), "threads": args.threads, "rounds": args.rounds, "seconds": args.seconds}
        print(json.dumps({**setting, "peers": about, "results": rows}, indent=1))
        return
    print(f"{cpu_name()}, {args.threads} threads; GFLOP/s, median of {args.rounds} rounds of {args.seconds} s")
    for name, facts in about.items():
        facts = {key: f"{value:.1e}" if isinstance(value, float) else value for key, value in facts.items()}
        print(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    live = [peer.name for peer in peers if "missing" not in peer.about]
    left = max(map(len, labels))
    width = max([9, *(len(name) + 1 for name in live)])
    print(" " * left + "".join(f"{name:>{width}}" for name in live))
    for label, times in zip(labels, results):
        cells = (f"{statistics.median(times[n]):{width}.1f}" if times[n] else f"{'-':>{width}}" for n in live)
        print(f"{label:{left}}" + "".join(cells))
