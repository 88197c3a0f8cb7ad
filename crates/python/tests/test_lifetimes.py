"""Memory that its owner lets go of while a call runs: read as it was."""

import subprocess
import sys

import pytest

PREPARE = """
import gc, threading, time
import torch, qkv

# Large enough to be given back to the system when it is let go of.
q, k = torch.ones(1, 1, 1 << 16, 64), torch.ones(1, 1, 4, 64)

class Exchanging:
    "An array of another library, which exchanges q's memory while it is read."
    def __dlpack__(self, **options):
        exchange()
        gc.collect()
        return k.__dlpack__(**options)
    def __dlpack_device__(self):
        return (1, 0)
"""
EXCHANGES = {
    "set_": "q.set_(torch.zeros(1))",
    "data": "q.data = torch.zeros(1, 1, 1, 1)",
}


def run(code):
    return subprocess.run([sys.executable, "-c", PREPARE + code], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_tensor_given_other_memory_by_an_argument_is_read_as_it_was(exchange):
    body = f"""
def exchange():
    {EXCHANGES[exchange]}

print(qkv.attention(q, Exchanging(), k).sum().item())
"""
    ran = run(body)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) == 2**22


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_tensor_given_other_memory_by_a_thread_is_read_as_it_was(exchange):
    body = f"""
k = torch.ones(1, 1, 4096, 64)
results = []
thread = threading.Thread(target=lambda: results.append(qkv.attention(q, k, k).sum().item()))
thread.start()
time.sleep(0.1)
{EXCHANGES[exchange]}
gc.collect()
thread.join()
print(*results)
"""
    ran = run(body)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) == 2**22
