"""Threads, forks and environments: each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import hmi_kernels
from hmi_kernels.settings import setting

COUNT = """
import torch, hmi_kernels
ids = torch.arange(100_000, dtype=torch.int32) % 1000
def count():
    keys, counts = hmi_kernels.count_ngrams(ids, torch.tensor([0, 100_000]), order=1)
    assert counts.tolist() == [100] * 1000
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("mode", ["pool", "openmp"])
def test_a_forked_child_works_on(mode: str) -> None:
    # The child calls no op of torch that would be parallel: libgomp would hang in it.
    code = COUNT + (
        "import os\n"
        "torch.set_num_threads(3); count()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    count(); count()\n"
        "    assert hmi_kernels.build_info()['threads_mode'] == 'pool'\n"
        "    os._exit(7)\n"
        "count()\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
    )
    result = run(code, HMI_THREADS=mode)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("HMI_SIMD", "avx1024", "HMI_SIMD must be one of auto, portable, avx2, avx512, not 'avx1024'"),
        ("HMI_THREADS", "many", "HMI_THREADS must be one of auto, pool, openmp"),
        ("HMI_BACKEND", "tpu", "HMI_BACKEND must be one of auto, cuda, triton, cpu, reference"),
    ],
)
def test_a_bad_setting_is_an_error(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        setting(variable)


def test_settings_are_followed() -> None:
    code = COUNT + (
        "count(); info = hmi_kernels.build_info()\n"
        "print(info['simd_active'], info['threads_mode'], hmi_kernels.active_backend())"
    )
    result = run(code, HMI_SIMD="portable", HMI_THREADS="pool", HMI_BACKEND="reference")
    assert result.stdout.split() == ["portable", "pool", "reference"], result.stderr


def test_without_the_compiled_module_the_reference_runs() -> None:
    code = (
        "import sys; sys.modules['hmi_kernels._C'] = None\n"
        + COUNT
        + (
            "count(); info = hmi_kernels.build_info()\n"
            "assert hmi_kernels.active_backend() == 'reference' and not info['compiled']\n"
            "counter = hmi_kernels.NgramCounter(1)\n"
            "counter.add(ids, torch.tensor([0, 100_000])); assert counter.total == 100_000\n"
            "from hmi_kernels.native import native\n"
            "try: native.plot_lookup\n"
            "except RuntimeError as error: print(error)\n"
        )
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "pip install" in result.stdout


def test_many_python_threads_at_once(threads_mode: str) -> None:
    ids = torch.randint(0, 500, (40_000,), dtype=torch.int32)
    offsets = torch.tensor([0, 40_000])
    expected = hmi_kernels.count_ngrams(ids, offsets, order=2)
    with ThreadPoolExecutor(6) as executor:
        results = list(executor.map(lambda _: hmi_kernels.count_ngrams(ids, offsets, order=2), range(24)))
    for keys, counts in results:
        assert torch.equal(keys, expected[0])
        assert torch.equal(counts, expected[1])


def test_changing_numbers_of_threads(threads_mode: str) -> None:
    ids = torch.randint(0, 500, (40_000,), dtype=torch.int32)
    offsets = torch.tensor([0, 40_000])
    before = torch.get_num_threads()
    expected = hmi_kernels.count_ngrams(ids, offsets, order=1)
    for num_threads in (1, 4, 2, 5, 1, 3):
        torch.set_num_threads(num_threads)
        torch.mm(torch.ones(64, 64), torch.ones(64, 64))
        assert torch.equal(hmi_kernels.count_ngrams(ids, offsets, order=1)[1], expected[1])
    torch.set_num_threads(before)
