"""A forked process computes what its parent does, or says at once why it cannot: torch's threads stay behind, and whoever waits for them hangs."""

import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch

import graphwright as gw
from graphwright.ir import forks

# Forks must not inherit the threads of pytest's workers, so that each case is a program of its own.
PROGRAM = """
import os, signal, sys
import torch
import graphwright as gw

torch.set_num_threads(2)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
x = torch.randn(4, 8)
compiled = gw.compile(model, example_inputs=(x,), backend="aten", cache=False)
if sys.argv[1] == "busy":
    expected = compiled(x)
    torch.randn(700, 700) @ torch.randn(700, 700)  # starts torch's threads
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    torch.set_num_threads(int(sys.argv[2]))
    try:
        {action}
    except gw.TargetError as error:
        print(error, flush=True)
    os._exit(0)
_, status = os.waitpid(pid, 0)
assert status == 0, status
compiled(x)
"""

ACTIONS = {
    "call": "print('equal' if torch.equal(compiled(x), expected) else 'other', flush=True)",
    "compile": "print(gw.compile(model, example_inputs=(x,), backend='aten', cache=False)(x).shape, flush=True)",
    "interpret": "from graphwright.ir.run import run; print(run(compiled.program, [x])[0][0].shape, flush=True)",
}


def forked(action: str, before: str, threads: int) -> str:
    command = [sys.executable, "-c", PROGRAM.replace("{action}", ACTIONS[action]), before, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("action", ACTIONS)
def test_a_child_that_would_wait_for_its_parents_threads_is_told_what_to_do(action: str) -> None:
    said = forked(action, "busy", 2)
    assert said.endswith("call torch.set_num_threads(1) first in it, or start it with the multiprocessing method spawn"), said


def test_a_child_of_one_thread_computes_the_same_bits() -> None:
    assert forked("call", "busy", 1) == "equal"


def test_a_lock_that_is_held_at_a_fork_is_open_in_the_child() -> None:
    locks = [forks.new_lock(), forks.new_rlock()]
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with locks[0], locks[1]:
            held.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        taken = all(lock.acquire(timeout=5) for lock in locks)
        os.write(writer, b"1" if taken else b"0")
        os._exit(0)
    os.waitpid(pid, 0)
    done.set()
    holder.join()
    assert os.read(reader, 1) == b"1"
    assert not any(getattr(lock, "locked", lambda: False)() for lock in locks)


def compiled_and_called(seed: int) -> torch.Tensor:
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(0.5), model.bias.zero_()
    return gw.compile(model, example_inputs=(torch.ones(2, 4),), backend="aten", cache=False)(torch.full((2, 4), float(seed)))


def test_spawned_processes_compile_and_call() -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(compiled_and_called, [1, 2])
    assert [each[0, 0].item() for each in results] == [2.0, 4.0]
