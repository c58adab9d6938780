"""The load benchmark: traffic by its laws, a generator that waits for nobody, sums that are right."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

REASON = "the benchmark needs the extra: bench"
pytest.importorskip("psutil", reason=REASON)
load = pytest.importorskip("benchmarks.load", reason=REASON)
from benchmarks.kept_steps import KeptSteps  # noqa: E402
from benchmarks.load_generator import LoadGenerator  # noqa: E402
from benchmarks.load_outcomes import Fate, Outcomes, Sample, summarise  # noqa: E402
from benchmarks.load_traffic import (  # noqa: E402
    draw_arrivals,
    heavy_popularity,
    poisson_times,
    zipf_popularity,
)
from benchmarks.report import render  # noqa: E402
from benchmarks.result import read_results  # noqa: E402
from hmi_engine.errors import DeadlineExceededError, EngineFaultError, OverloadedError  # noqa: E402
from hmi_engine.request import Request, Response  # noqa: E402

REQUEST = Request("tenant", "a text")


def test_poisson_times_have_a_poisson_count_and_exponential_gaps() -> None:
    generator = np.random.default_rng(1)
    times = poisson_times(1000.0, 40.0, generator)
    assert len(times) == pytest.approx(40_000, abs=4 * 200)
    gaps = np.diff(times)
    assert (gaps >= 0).all() and times[0] >= 0 and times[-1] < 40
    # The share of gaps above t is exp(-1000 t); 1e-2 is far beyond the deviation of 40,000 gaps.
    for milliseconds in (0.2, 1.0, 3.0):
        assert (gaps > milliseconds / 1e3).mean() == pytest.approx(np.exp(-milliseconds), abs=1e-2)


def test_popularity() -> None:
    heavy = heavy_popularity(100, 100)
    assert heavy.sum() == pytest.approx(1) and heavy[0] == pytest.approx(100 * heavy[1])
    zipf = np.sort(zipf_popularity(50, 1.0))[::-1]
    assert zipf.sum() == pytest.approx(1) and zipf[0] == pytest.approx(10 * zipf[9])
    assert zipf_popularity(50, 0.0) == pytest.approx(np.full(50, 0.02))


def test_arrivals_follow_the_popularity_and_their_seed() -> None:
    popularity = heavy_popularity(5, 4)
    first, again, other = (draw_arrivals(popularity, 7, 500.0, 40.0, seed) for seed in (3, 3, 4))
    assert np.array_equal(first.due, again.due) and np.array_equal(first.tenants, again.tenants)
    assert not np.array_equal(first.due[:50], other.due[:50])
    shares = np.bincount(first.tenants, minlength=5) / len(first)
    assert shares == pytest.approx(popularity, abs=0.02)
    assert all(len(set(first.texts[start : start + 7])) == 7 for start in range(100))


fates = st.sampled_from([Fate.ANSWERED, Fate.REFUSED, Fate.EXPIRED, Fate.FAILED])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 3), fates), min_size=1, max_size=60))
def test_sums_are_those_of_single_requests(ends: list[tuple[float, float, Fate]]) -> None:
    outcomes = Outcomes(np.array([due for due, _, _ in ends]))
    for number, (due, latency, fate) in enumerate(ends):
        outcomes.end(number, fate, due + latency)
    parts = [Sample.of(outcomes, 0, 5), Sample.of(outcomes, 5, 10.1)]
    summary = summarise(parts, 1.0)
    latencies = sorted((due + latency) - due for due, latency, fate in ends if fate == Fate.ANSWERED)
    good = sum(latency <= 1 for latency in latencies)
    assert summary.offered * 10.1 == pytest.approx(len(ends))
    assert summary.answered * 10.1 == pytest.approx(len(latencies))
    assert summary.goodput * 10.1 == pytest.approx(good)
    for name, fate in (("refused_share", Fate.REFUSED), ("expired_share", Fate.EXPIRED)):
        assert vars(summary)[name] * len(ends) == pytest.approx(sum(each[2] == fate for each in ends))
    if latencies:
        assert latencies[0] <= summary.p50 <= summary.p95 <= summary.p99 <= latencies[-1] + 1e-9
    else:
        assert np.isnan(summary.p50)


def test_a_request_ends_once_and_all_must_end() -> None:
    outcomes = Outcomes(np.zeros(2))
    outcomes.end(0, Fate.ANSWERED, 1.0)
    with pytest.raises(ValueError, match="request 0 ended as ANSWERED already"):
        outcomes.end(0, Fate.FAILED, 2.0)
    with pytest.raises(ValueError, match="1 of 2 requests have not ended"):
        Sample.of(outcomes, 0, 1)


class _Engine:
    """Answers nothing until ``answers_at`` requests have come; then all, from another thread."""

    def __init__(self, answers_at: int, *, room: int = 10**9) -> None:
        self.answers_at = answers_at
        self.room = room
        self.most_open = 0
        self.timeouts: list[float | None] = []
        self._waiting: list[Future[Response]] = []

    def submit_nowait(self, request: Request, *, timeout: float | None = None) -> Future[Response]:
        if len(self._waiting) >= self.room:
            raise OverloadedError("full")
        self.timeouts.append(timeout)
        future: Future[Response] = Future()
        self._waiting.append(future)
        self.most_open = max(self.most_open, len(self._waiting))
        if len(self.timeouts) >= self.answers_at:
            waiting, self._waiting = self._waiting, []
            threading.Thread(target=_answer_all, args=(waiting,)).start()
        return future


def _answer_all(futures: list[Future[Response]]) -> None:
    errors = [None, DeadlineExceededError("late"), EngineFaultError("broken")]
    for number, future in enumerate(futures):
        error = errors[number % 4] if number % 4 < 3 else None
        if number % 4 == 3:
            future.set_exception(OverloadedError("over its share"))
        else:
            future.set_result(Response("tenant", "error" if error else "embedding", error=error))


def test_an_open_loop_waits_for_no_answer_and_knows_every_fate() -> None:
    engine = _Engine(answers_at=40)
    due = np.sort(np.random.default_rng(0).random(40)) * 0.1
    run = LoadGenerator(engine, timeout=0.5).open_loop([REQUEST] * 40, due)
    assert engine.most_open == 40 and engine.timeouts == [0.5] * 40
    assert np.bincount(run.outcomes.fates, minlength=5).tolist() == [0, 10, 10, 10, 10]
    assert (run.lateness >= -1e-3).all()  # nothing was sent before its time
    assert (run.outcomes.finished >= due).all()
    assert run.generator_seconds > 0


def test_an_open_loop_notes_what_is_refused_at_once() -> None:
    engine = _Engine(answers_at=10**9, room=0)
    run = LoadGenerator(engine).open_loop([REQUEST] * 5, np.zeros(5))
    assert (run.outcomes.fates == Fate.REFUSED).all()


def test_a_closed_loop_keeps_so_many_open() -> None:
    engine = _Engine(answers_at=0)
    engine.answers_at = 8

    def submit(request: Request, *, timeout: float | None = None) -> Future[Response]:
        future: Future[Response] = Future()
        engine._waiting.append(future)
        engine.most_open = max(engine.most_open, len(engine._waiting))
        if len(engine._waiting) == 8:
            engine._waiting.pop(0).set_result(Response("tenant", "embedding"))
        return future

    engine.submit_nowait = submit  # type: ignore[method-assign]
    threading.Timer(
        0.4, lambda: [each.set_result(Response("tenant", "embedding")) for each in engine._waiting]
    ).start()
    run = LoadGenerator(engine).closed_loop([REQUEST] * 3, concurrency=8, seconds=0.2)
    assert engine.most_open == 8
    assert len(run.outcomes) > 8 and (run.outcomes.fates == Fate.ANSWERED).all()
    assert run.outcomes.finish_rate(0.0, 0.2) * 0.2 == pytest.approx(len(run.outcomes) - 8, abs=1.01)


def test_steps_are_kept_for_the_same_settings_only(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    worked: list[str] = []

    def work(name: str) -> list[float]:
        worked.append(name)
        return [1.5, 2.5]

    for _ in range(2):
        steps = KeptSteps(out, "settings")
        assert steps.take("first", list[float], lambda: work("first")) == [1.5, 2.5]
    assert worked == ["first"]
    KeptSteps(out, "other settings").take("first", list[float], lambda: work("again"))
    assert worked == ["first", "again"]
    steps = KeptSteps(out, "other settings")
    steps.forget()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_quick_benchmark_runs(tmp_path: Path) -> None:
    """A real engine under load, for seconds."""
    out = tmp_path / "results" / "load.json"
    load.main(["--quick", "--out", str(out)])
    [result] = read_results(out.parent)
    assert [row[0] for row in result.tables[0].rows] == ["50%", "120%"]
    assert len(result.tables[1].rows) == 3
    quantities = {item.name: item.value for item in result.quantities}
    assert quantities["requests that failed otherwise"] == 0
    figures = tmp_path / "figures"
    figures.mkdir()
    page = render([result], figures, relative_to=tmp_path)
    assert "load-latency.svg" in page and "load-goodput.svg" in page
    assert not out.with_suffix(".steps").exists()
