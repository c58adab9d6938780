"""Two writers at once, threads or processes: one waits or hears that the store is busy; no change is lost."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sentences
from crash_child import CrashRunner

import hmi_engine as hmi
import hmi_kernels
from hmi_engine.knowledge.plot_table import open_plot

CORPORA = [sentences(60, seed=seed) for seed in (30, 31, 32)]
REFUSALS = {
    "StoreBusyError",
    "DomainExistsError",
    "DomainCycleError",
    "UnknownDomainError",
    "DomainInUseError",
}
Job = dict[str, Any]
Runner = Callable[[Path, list[Job]], list[str]]
"""Does the jobs at once and returns for each the name of the error it ended with, or nothing."""


def job(call: str, *arguments: Any, **options: Any) -> Job:
    return {"call": call, "arguments": list(arguments), "options": options}


@pytest.fixture(scope="module")
def origin(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("origin") / "store"
    with hmi.Store.create(path, general=tiny_bert, plot_layers=2) as store:
        for name in ("base", "other"):
            store.add_domain(name, CORPORA[0], min_count=1)
        store.add_domain("child", CORPORA[1], parent="base", min_count=1)
    return path


@pytest.fixture(scope="module")
def processes() -> Iterator[Runner]:
    runners = [CrashRunner() for _ in range(2)]

    def run(path: Path, jobs: list[Job]) -> list[str]:
        with ThreadPoolExecutor(len(runners)) as pool:
            done = pool.map(lambda runner, work: runner.run(store=str(path), **work), runners, jobs)
            return [answer["error"] for answer in done]

    yield run
    for runner in runners:
        runner.close()


def run_threads(path: Path, jobs: list[Job]) -> list[str]:
    """Two threads of one process that share an open store."""

    def work(store: hmi.Store, todo: Job) -> str:
        try:
            getattr(store, todo["call"])(*todo["arguments"], **todo["options"])
        except hmi.HmiError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    with hmi.Store.open(path) as store, ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(lambda todo: work(store, todo), jobs))


@pytest.fixture(params=["threads", "processes"])
def run_at_once(request: pytest.FixtureRequest) -> Runner:
    if request.param == "threads":
        return run_threads
    runner: Runner = request.getfixturevalue("processes")
    return runner


PAIRS = {
    "add the same": [job("add_domain", "new", texts, min_count=1) for texts in CORPORA[1:]],
    "update the same": [job("update_domain", "base", texts) for texts in CORPORA[1:]],
    "add below what is updated": [
        job("add_domain", "new", CORPORA[2], parent="base", min_count=1),
        job("update_domain", "base", CORPORA[1]),
    ],
    "add below what moves": [
        job("add_domain", "new", CORPORA[2], parent="child", min_count=1),
        job("move_domain", "child", "other"),
    ],
    "add below what is removed": [
        job("add_domain", "new", CORPORA[2], parent="child", min_count=1),
        job("remove_domain", "child"),
    ],
    "move under each other": [job("move_domain", "base", "other"), job("move_domain", "other", "base")],
    "update and move": [job("update_domain", "base", CORPORA[2]), job("move_domain", "base", "other")],
    "update and remove": [job("update_domain", "child", CORPORA[2]), job("remove_domain", "child")],
}


@pytest.mark.parametrize("pair", PAIRS)
def test_two_changes_at_once(origin: Path, tmp_path: Path, run_at_once: Runner, pair: str) -> None:
    path = Path(shutil.copytree(origin, tmp_path / "store"))
    errors = run_at_once(path, PAIRS[pair])
    assert "" in errors, "one of them must come through"
    assert {error.partition(":")[0] for error in errors if error} <= REFUSALS
    with hmi.Store.open(path) as store:
        # One that was refused may have left what it can go on from when it is given again.
        left_over = {"unfinished"} if any(errors) else set()
        assert {problem.kind for problem in store.verify()} <= left_over
        expected = {"base": [0], "other": [0], "child": [1]}
        for change, error in zip(PAIRS[pair], errors, strict=True):
            name, corpus = (
                change["arguments"] if len(change["arguments"]) == 2 else (*change["arguments"], None)
            )
            if error:
                continue
            if change["call"] == "remove_domain":
                del expected[name]
            elif change["call"] != "move_domain":
                expected[name] = [*expected.get(name, []), CORPORA.index(corpus)]
        assert {name: counts(store, name) for name in store.domains if name != "general"} == {
            name: bigrams(store, corpora) for name, corpora in expected.items()
        }
        found = rows(store)
    done = [change for change, error in zip(PAIRS[pair], errors, strict=True) if not error]
    assert any(
        found == rows_after(Path(shutil.copytree(origin, tmp_path / str(number))), list(order))
        for number, order in enumerate(permutations(done))
    ), "the rows are those of no order of the changes"


def rows(store: hmi.Store) -> dict[str, list[int]]:
    """The n-grams with a row, by domain."""
    files = {name: info.file for name, info in store.domains.items() if info.file}
    return {name: open_plot(store.layout.resolve(file)).row_keys.tolist() for name, file in files.items()}


def rows_after(path: Path, changes: list[Job]) -> dict[str, list[int]]:
    """Those of the store at ``path`` after changes one by one."""
    with hmi.Store.open(path) as store:
        for change in changes:
            getattr(store, change["call"])(*change["arguments"], **change["options"])
        return rows(store)


def bigrams(store: hmi.Store, corpora: list[int]) -> Counter[tuple[int, ...]]:
    texts = [text for corpus in corpora for text in CORPORA[corpus]]
    return Counter(pair for ids in store.encoder.token_ids(texts) for pair in pairwise(ids))


def counts(store: hmi.Store, name: str) -> Counter[tuple[int, ...]]:
    """All n-grams that a domain's table knows of, with a row and without."""
    table = open_plot(store.layout.resolve(str(store.domains[name].file)))
    tokens = hmi_kernels.ngram_tokens(torch.cat([table.row_keys, table.candidate_keys])).tolist()
    numbers = torch.cat([table.row_counts, table.candidate_counts]).tolist()
    return Counter({tuple(row[:2]): number for row, number in zip(tokens, numbers, strict=True)})


def test_a_repair_waits_for_nobody(origin: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(origin, tmp_path / "store"))
    with (
        hmi.Store.open(path) as one,
        hmi.Store.open(path),
        pytest.raises(hmi.HmiError, match="open for writing"),
    ):
        one.repair(one.verify())
