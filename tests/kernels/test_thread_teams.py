"""A thread's team of OpenMP threads ends when it is let go, and comes again with the next operation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hmi_engine as hmi

THREADS = 4
COUNT = """
import os
import threading
import time

def native_threads():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

def ended_after_a_while(before, expected):
    # How many threads have ended, once as many as expected have, or after a while.
    until = time.monotonic() + 20
    while before - native_threads() < expected and time.monotonic() < until:
        time.sleep(0.05)
    return before - native_threads()
"""
RELEASE = f"""
{COUNT}
import torch
import hmi_kernels

torch.set_num_threads({THREADS})
numbers = torch.arange(1 << 20, dtype=torch.float64)
hmi_kernels.release_team()
hmi_kernels.release_team()  # there is none
alone = native_threads()
for _ in range(2):
    assert numbers.square().sum() == sum(number * number for number in range(1 << 20))
    with_team = native_threads()
    hmi_kernels.release_team()
    print(with_team - alone, native_threads() - alone)
"""
ENGINE = f"""
{COUNT}
import asyncio
import sys
import torch
import hmi_engine as hmi
import hmi_kernels

torch.set_num_threads({THREADS})
with hmi.Store.open(sys.argv[1], read_only=True) as store:
    store.encoder.encode(["the tokenizer has threads of its own"] * 64)
    torch.arange(1 << 20, dtype=torch.float64).square()
    hmi_kernels.release_team()
    before = native_threads()
    torch.arange(1 << 20, dtype=torch.float64).square()
    print(native_threads() - before)
    engine = hmi.AsyncEngine(store)
    print(native_threads() - before)
    for _ in range(2):
        assert engine.submit_nowait(hmi.Request("t", text="some words")).result().error is None
        print(ended_after_a_while(native_threads(), {THREADS - 1}))
    asyncio.run(engine.close())
"""
WAITING = f"""
{COUNT}
import torch
from hmi_engine.waiting_for_work import wait_for_work

torch.set_num_threads({THREADS})
arrived, has_come, team = threading.Condition(), [], []

def work():
    torch.arange(1 << 20, dtype=torch.float64).square()
    team.append(native_threads() - before)
    with arrived:
        wait_for_work(arrived, lambda: bool(has_come))

before = native_threads()
thread = threading.Thread(target=work)
thread.start()
while not team:
    time.sleep(0.01)
print(*team, ended_after_a_while(before + team[0], team[0]))
with arrived:
    arrived.notify()  # for nothing
with arrived:
    has_come.append(1)
    arrived.notify()
thread.join(10)
print(int(thread.is_alive()))
"""

if not Path("/proc/self/task").exists():
    pytest.skip("threads cannot be counted here", allow_module_level=True)


def run(script: str, *arguments: str) -> list[int]:
    command = [sys.executable, "-c", script, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return [int(number) for number in found.stdout.split()]


def test_a_team_is_let_go_and_comes_again() -> None:
    assert run(RELEASE) == [THREADS - 1, 0] * 2


def test_an_engine_that_serves_on_its_own_thread_lets_the_callers_team_go(store, make_head) -> None:
    store.add_tenant("t", domain="words", adapter=hmi.Adapter({}), head=make_head(store.general))
    team, left, *at_rest = run(ENGINE, str(store.layout.root))
    assert team == THREADS - 1
    assert left <= 0
    assert at_rest == [THREADS - 1] * 2, "the team ends each time, once there is nothing to do for a second"


def test_a_thread_that_waits_for_work_lets_its_team_go() -> None:
    assert run(WAITING) == [THREADS - 1, THREADS - 1, 0]
