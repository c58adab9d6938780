"""Whatever is done to a domain tree, answers do not change, and counts are those of a Counter.

Hypothesis invents histories of changes; after each change the store is compared with plain dictionaries and
with transformers' own layers (tests/reference_hbert.py).
"""

import copy
import itertools
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import hypothesis.strategies as st
import pytest
import torch
from conftest import sentences
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from reference_hbert import merged, upper_layers
from transformers import BertModel

import hmi_engine as hmi
import hmi_kernels
from hmi_engine.errors import DomainCycleError, DomainInUseError
from hmi_engine.knowledge.plot_table import PlotTable, open_plot
from hmi_engine.knowledge.traffic_file import TrafficCounts

CORPORA = [sentences(25, seed=seed, longest=9) for seed in range(10, 15)]
QUESTIONS = sentences(3, seed=20, longest=7)
PLOT_LAYERS = 2
NAMES = ["a", "b", "c", "d", "e"]
BUDGETS = ["0", "4KiB", "16KiB", "4MiB"]
TOLERANCES = {"float32": 1e-4, "float16": 2e-2}

corpora = st.integers(0, len(CORPORA) - 1)
places = st.integers(0, 100)
"""Which of the domains there are, counted modulo their number."""


@dataclass
class ExpectedDomain:
    """What a domain should be."""

    parent: str
    min_count: int
    corpora: list[int] = field(default_factory=list)
    whole: bool = True
    """Whether its table still knows every n-gram that was ever counted."""


class DomainTree(RuleBasedStateMachine):
    """A store, an engine that stays open over its changes, and what they should be."""

    origin: ClassVar[Path]
    folder: ClassVar[Path]
    numbers: ClassVar[Iterator[int]]
    counters: ClassVar[list[Counter[tuple[int, ...]]]]
    answers: ClassVar[list[list[torch.Tensor]]]
    """Those of the base model's domain layers, and of the other ones."""
    layers: ClassVar[dict[str, torch.Tensor]]
    """Other domain layers."""

    @initialize()
    def start(self) -> None:
        self.path = Path(shutil.copytree(self.origin, self.folder / str(next(self.numbers))))
        self.expected: dict[str, ExpectedDomain] = {}
        self.rounded = False
        self.open()

    def open(self) -> None:
        self.store = hmi.Store.open(self.path)
        self.engine = hmi.Engine(self.store, miss="exact", overlay_memory="256KiB", record_traffic=False)

    def close(self) -> None:
        self.engine.close()
        self.store.close()

    def teardown(self) -> None:
        self.close()
        shutil.rmtree(self.path)

    def choose(self, place: int, *, root: bool = False) -> str:
        names = [*(["general"] if root else []), *sorted(self.expected)]
        return names[place % len(names)]

    @rule(
        name=st.sampled_from(NAMES),
        corpus=corpora,
        parent=places,
        budget=st.sampled_from(BUDGETS),
        min_count=st.integers(1, 3),
        row_format=st.sampled_from(["float32", "float16"]),
    )
    def add(self, name: str, corpus: int, parent: int, budget: str, min_count: int, row_format: str) -> None:
        if name in self.expected:
            return
        above = self.choose(parent, root=True)
        self.store.add_domain(
            name, CORPORA[corpus], parent=above, plot_bytes=budget, min_count=min_count, row_format=row_format
        )
        self.store.add_tenant(
            f"of-{name}",
            domain=name,
            adapter=hmi.Adapter({}),
            head=hmi.EmbeddingHead("mean", normalize=False),
        )
        self.rounded |= row_format == "float16"
        self.expected[name] = ExpectedDomain(above, min_count, [corpus])

    @precondition(lambda self: self.expected)
    @rule(place=places, corpus=corpora)
    def update(self, place: int, corpus: int) -> None:
        name = self.choose(place)
        self.store.update_domain(name, CORPORA[corpus])
        self.expected[name].corpora.append(corpus)

    @precondition(lambda self: self.expected)
    @rule(place=places, corpus=corpora, promotions=st.sampled_from([0, 3, None]))
    def update_by_traffic(self, place: int, corpus: int, promotions: int | None) -> None:
        name = self.choose(place)
        windows = self.counters[corpus]
        keys = hmi_kernels.ngram_keys(torch.tensor(list(windows), dtype=torch.int32))
        weights = torch.tensor(list(windows.values()), dtype=torch.float64)
        order = keys.argsort()
        # Without tokens no time passes, so that the traffic weighs as much as the corpora.
        counts = TrafficCounts(
            keys=keys[order],
            weights=weights[order],
            occurrences=float(weights.sum()),
            max_error=0.0,
            tokens=0,
            windows=int(weights.sum()),
            hits=0,
        )
        self.store.save_traffic(name, counts)
        self.store.update_domain(name, max_promotions=promotions)
        assert self.store.catalog.traffic_files() == []
        self.expected[name].corpora.append(corpus)

    @precondition(lambda self: self.expected)
    @rule(place=places, own=st.booleans())
    def change_layers(self, place: int, own: bool) -> None:
        self.store.set_domain_layers(self.choose(place), self.layers if own else None)

    @precondition(lambda self: self.expected)
    @rule(place=places, to=places)
    def move(self, place: int, to: int) -> None:
        name, parent = self.choose(place), self.choose(to, root=True)
        if name in self.ancestors(parent):
            with pytest.raises(DomainCycleError):
                self.store.move_domain(name, parent)
        else:
            self.store.move_domain(name, parent)
            self.expected[name].parent = parent

    def ancestors(self, name: str) -> list[str]:
        """A domain and those above it, without the root."""
        found = []
        while name != "general":
            found.append(name)
            name = self.expected[name].parent
        return found

    @precondition(lambda self: self.expected)
    @rule(place=places)
    def remove(self, place: int) -> None:
        name = self.choose(place)
        if any(domain.parent == name for domain in self.expected.values()):
            with pytest.raises(DomainInUseError):
                self.store.remove_domain(name)
            return
        self.store.remove_tenant(f"of-{name}")
        self.store.remove_domain(name)
        del self.expected[name]

    @rule()
    def reopen(self) -> None:
        self.close()
        self.open()

    @invariant()
    def the_store_is_sound(self) -> None:
        assert self.store.verify() == []
        found = {name: info.parent for name, info in self.store.domains.items() if name != "general"}
        assert found == {name: domain.parent for name, domain in self.expected.items()}

    @invariant()
    def counts_are_those_of_a_counter(self) -> None:
        for name, domain in self.expected.items():
            counted = sum((self.counters[corpus] for corpus in domain.corpora), Counter[tuple[int, ...]]())
            table = self.table(name)
            found = dict(zip(*tokens_and_counts(table), strict=True))
            assert len(found) == len(table.row_keys) + len(table.candidate_keys)
            assert all(count <= counted[window] for window, count in found.items())
            if domain.whole:
                assert found.items() <= counted.items()
                domain.whole = len(found) == len(counted)

    @invariant()
    def rows_are_stored_once(self) -> None:
        for name in self.expected:
            chain = [info.name for info in self.store.catalog.chain(name)]
            keys = torch.cat([self.table(node).row_keys for node in chain])
            assert len(keys) == len(keys.unique())

    @invariant()
    def answers_do_not_change(self) -> None:
        requests = [hmi.Request(f"of-{name}", text=text) for name in self.expected for text in QUESTIONS]
        responses = iter(self.engine.run(requests))
        tolerance = TOLERANCES["float16" if self.rounded else "float32"]
        for name in self.expected:
            above = self.ancestors(name)
            has_own = any(self.store.domains[node].layers for node in above)
            is_base = self.store.domains[name].layer_identity == self.store.general.domain_layers
            assert has_own != is_base
            for expected in self.answers[has_own]:
                response = next(responses)
                assert response.error is None
                found = torch.from_numpy(response.embedding)
                torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)

    def table(self, name: str) -> PlotTable:
        file = self.store.domains[name].file
        assert file is not None
        return open_plot(self.store.layout.resolve(file))


def tokens_and_counts(table: PlotTable) -> tuple[list[tuple[int, ...]], list[int]]:
    """The windows of rows and candidates, as token ids by slot, and their counts."""
    tokens = hmi_kernels.ngram_tokens(torch.cat([table.row_keys, table.candidate_keys]))
    counts = torch.cat([table.row_counts, table.candidate_counts])
    return [tuple(row) for row in tokens.tolist()], counts.tolist()


def count_windows(token_ids: list[list[int]], window: int) -> Counter[tuple[int, ...]]:
    """Every window of a corpus, -1 where a slot is absent."""
    counted: Counter[tuple[int, ...]] = Counter()
    for ids in token_ids:
        counted.update((a, b, -1) for a, b in itertools.pairwise(ids))
        if window == 3:
            counted.update(zip(ids, ids[1:], ids[2:], strict=False))
            counted.update((-1, a, b) for a, b in itertools.pairwise(ids))
    return counted


@torch.no_grad()
def mean_states(
    model: BertModel, domain: BertModel, token_ids: list[list[int]], window: int
) -> list[torch.Tensor]:
    """Through the domain layers of ``domain`` and the upper ones of ``model``."""
    return [
        upper_layers(model, merged(domain, ids, PLOT_LAYERS, window), PLOT_LAYERS).mean(0)
        for ids in token_ids
    ]


@torch.no_grad()
def other_layers(model: BertModel) -> BertModel:
    """The model with other weights in its layers."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in other.encoder.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize(
    ("histories", "steps"),
    [pytest.param(12, 8, id="some"), pytest.param(300, 20, id="many", marks=pytest.mark.slow)],
)
def test_any_history_of_changes(
    tiny_bert: Path, tmp_path: Path, window: int, histories: int, steps: int
) -> None:
    model = BertModel.from_pretrained(tiny_bert).eval()

    class Machine(DomainTree):
        origin, folder, numbers = tmp_path / "origin", tmp_path, itertools.count()

    with hmi.Store.create(
        Machine.origin, general=tiny_bert, plot_layers=PLOT_LAYERS, window=window, row_dtype="float32"
    ) as store:
        Machine.counters = [count_windows(store.encoder.token_ids(texts), window) for texts in CORPORA]
        questions = store.encoder.token_ids(QUESTIONS)
    other = other_layers(model)
    Machine.layers = dict(other.state_dict())
    Machine.answers = [mean_states(model, domain, questions, window) for domain in (model, other)]
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=histories,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
