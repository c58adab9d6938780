"""What threads share, hammered by a C++ program under ThreadSanitizer; and that it finds what is broken."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from emulator.build import ROOT, compiler_command, run_ninja

SECTIONS = ("readers", "thread_pool", "parallel_for", "counter", "block_pool", "sketch")
SOURCES = (
    "tests/kernels/native/stress_threads.cpp",
    "csrc/common/block_pool.cpp",
    "csrc/common/file_read.cpp",
    "csrc/common/file_reads.cpp",
    "csrc/common/parallel.cpp",
    "csrc/common/read_files.cpp",
    "csrc/common/read_latency.cpp",
    "csrc/common/reader_pool.cpp",
    "csrc/common/thread_pool.cpp",
    "csrc/cpu/frequency_sketch.cpp",
    "csrc/cpu/ngram_counter.cpp",
)
FOLDER = ROOT / "build" / "sanitized"
FLAGS = f"-std=c++17 -O1 -g -pthread -Wall -Wextra -fsanitize=thread -I{ROOT / 'csrc'}"


class Mutation(NamedTuple):
    """What keeps threads apart is taken away, and the section must miss it."""

    section: str
    source: str
    old: str
    """Text that is there once."""
    new: str

    def __str__(self) -> str:
        return f"{self.section}: {self.source}"


MUTATIONS = (
    Mutation(
        "readers",
        "csrc/common/file_reads.cpp",
        "  const std::lock_guard<std::mutex> lock(mutex_);\n  return progress_;",
        "  return progress_;",
    ),
    Mutation(
        "readers",
        "csrc/common/file_reads.cpp",
        "  const std::lock_guard<std::mutex> lock(mutex_);\n  FileReadOutcome canceled;",
        "  FileReadOutcome canceled;",
    ),
    Mutation(
        "readers",
        "csrc/common/reader_pool.cpp",
        "  const std::lock_guard<std::mutex> lock(mutex_);\n  queue_.push_back",
        "  queue_.push_back",
    ),
    Mutation(
        "readers",
        "csrc/common/file_reads.cpp",
        "  if (!is_of_this_process()) return true;\n  const std::lock_guard<std::mutex> lock(mutex_);\n",
        "  if (!is_of_this_process()) return true;\n",
    ),
    Mutation(
        "thread_pool",
        "csrc/common/thread_pool.cpp",
        "if (num_inside_.load(std::memory_order_acquire) == 0) return;",
        "if (num_inside_.load(std::memory_order_relaxed) == 0) return;",
    ),
    Mutation(
        "parallel_for",
        "csrc/common/parallel.cpp",
        "next_worker.fetch_add(1, std::memory_order_relaxed)",
        "next_worker.fetch_add(0, std::memory_order_relaxed)",
    ),
    Mutation(
        "block_pool",
        "csrc/common/block_pool.cpp",
        "if (address == nullptr) return;\n  const std::lock_guard<std::mutex> lock(mutex_);",
        "if (address == nullptr) return;",
    ),
    Mutation(
        "sketch",
        "csrc/cpu/frequency_sketch.cpp",
        "    const std::lock_guard<std::mutex> lock(shards_[shard]->mutex);\n    WeightTable& table",
        "    WeightTable& table",
    ),
)


def build(*mutations: Mutation) -> Path:
    """The program, compiled where it is out of date; each mutant's own objects lie beside the common ones."""
    name = "-".join(["stress", *(str(MUTATIONS.index(each)) for each in mutations)])
    objects = []
    lines = [
        "rule compile",
        f"  command = {shlex.join(compiler_command())} {FLAGS} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join(compiler_command())} {FLAGS} $in -o $out -ldl",
    ]
    for source in SOURCES:
        path = ROOT / source
        target = FOLDER / f"{path.stem}.o"
        for mutation in mutations:
            if mutation.source == source:
                target = FOLDER / f"{path.stem}-{name}.o"
                path = mutated(mutation, FOLDER / f"{path.stem}-{name}.cpp")
        objects.append(str(target))
        lines.append(f"build {target}: compile {path}")
    program = FOLDER / name
    run_ninja(FOLDER, "\n".join([*lines, f"build {program}: link {' '.join(objects)}", ""]), program)
    return program


def mutated(mutation: Mutation, path: Path) -> Path:
    text = (ROOT / mutation.source).read_text()
    assert text.count(mutation.old) == 1, f"{mutation} no longer fits the source"
    text = text.replace(mutation.old, mutation.new)
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return path


@pytest.fixture(scope="module")
def sanitizer(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where the compiler has no ThreadSanitizer, or the kernel leaves it no room."""
    program = tmp_path_factory.mktemp("probe") / "probe"
    command = [*compiler_command(), "-fsanitize=thread", "-x", "c++", "-", "-o", str(program)]
    built = subprocess.run(command, input=b"int main() {}", capture_output=True, check=False)
    if built.returncode or subprocess.run([program], capture_output=True, check=False).returncode:
        pytest.skip("ThreadSanitizer cannot be used with this compiler and kernel")


def run(program: Path, folder: Path, *sections: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    command = [str(program), str(folder), *sections]
    # After a race nothing is sure, not even that the program ends.
    settings = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300, check=False)


def test_nothing_races(sanitizer: None, tmp_path: Path) -> None:
    result = run(build(), tmp_path / "files")
    assert result.returncode == 0 and "WARNING: ThreadSanitizer" not in result.stderr, result.stderr[-10_000:]
    assert result.stdout.split() == list(SECTIONS)


@pytest.mark.parametrize(
    "mutation",
    [MUTATIONS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in MUTATIONS[1:])],
    ids=str,
)
def test_what_keeps_threads_apart_is_missed(sanitizer: None, tmp_path: Path, mutation: Mutation) -> None:
    program = build(mutation)
    results = (run(program, tmp_path / str(number), mutation.section) for number in range(5))
    assert any("WARNING: ThreadSanitizer: data race" in result.stderr for result in results)
