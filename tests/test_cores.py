"""How a process uses the processor: memory that is kept is not faulted in again and again, and no bit changes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from dpkit import cores

MEASURE = """
import json, resource, sys, torch
from dpkit import cores
torch.set_num_threads(1)
told = cores.keep_memory() if sys.argv[1] == "keep" else None
x = torch.linspace(-1, 1, 12_000_000)
def work():
    return float((x * 2 + 1).sin().sum())
for _ in range(5):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
values = [work() for _ in range(30)]
print(json.dumps([told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, values]))
"""


def measured(word):
    found = subprocess.run([sys.executable, "-c", MEASURE, word], capture_output=True, text=True, check=True, timeout=120)
    return json.loads(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_kept_memory_is_faulted_in_far_less_often_and_changes_no_bit():
    (_, faults, values), (told, kept, same) = measured("leave"), measured("keep")
    assert told is True
    assert kept < faults / 10, f"{kept} page faults with memory kept, {faults} without"
    assert same == values


def test_a_c_library_without_mallopt_is_left_alone(monkeypatch):
    monkeypatch.setattr(cores.ctypes, "CDLL", lambda name: object())
    assert cores.keep_memory() is False


def test_cores_are_those_that_the_process_may_use():
    assert 1 <= cores.available() <= os.cpu_count()


def test_the_number_of_threads_is_set_and_the_former_one_told():
    before = torch.get_num_threads()
    assert cores.use(1) == before
    assert cores.use(before) == 1
    assert torch.get_num_threads() == before
