"""The stores and tables of the accuracy study, made when a run first needs them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

from benchmarks.accuracy_study.fine_tuning import FineTuning, fine_tune
from benchmarks.accuracy_study.methods import SHIPPED, Hierarchical, TableText
from benchmarks.accuracy_study.plan import base_identity
from benchmarks.accuracy_study.records import Outcome
from benchmarks.accuracy_study.sets import StudySet
from hmi_engine.demo.base_model import packaged_distillation, packaged_model
from hmi_engine.store import Store

__all__ = ["UNLABELLED_TEXTS", "StudyStores", "table_texts", "unlabelled_texts"]

UNLABELLED_TEXTS = 8000
"""Of which a teacher says something to a tenant, beside the set's own texts."""

_SHARES: dict[TableText, float] = {"quarter": 0.25, "half": 0.5, "own": 1.0}


def table_texts(table: TableText, labelled: StudySet, sets: Sequence[StudySet]) -> tuple[str, ...]:
    """Distinct training texts that a table is built from; none of them is held out in any of ``sets``.

    A share of a set's text is drawn at random, the same in every run.
    """
    held_out = frozenset[str]().union(*(each.held_out_texts() for each in sets))
    if table == "all":
        others = [each for each in sets if each.name != labelled.name]
        texts = dict.fromkeys(text for each in (labelled, *others) for text in each.training_texts())
    else:
        texts = dict.fromkeys(labelled.training_texts())
    allowed = [text for text in texts if text not in held_out]
    share = _SHARES.get(table, 1.0)
    return tuple(allowed if share == 1 else random.Random(0).sample(allowed, round(share * len(allowed))))


def unlabelled_texts(labelled: StudySet, sets: Sequence[StudySet]) -> tuple[str, ...]:
    """Training texts of the other sets, drawn at random, without their labels; none of them is held out."""
    own = set(labelled.training_texts())
    others = [text for text in table_texts("all", labelled, sets) if text not in own]
    return tuple(random.Random(0).sample(others, min(UNLABELLED_TEXTS, len(others))))


class StudyStores(AbstractContextManager["StudyStores"]):
    """One store for each base, K and width of windows, with a domain for each table."""

    def __init__(self, folder: Path, sets: Sequence[StudySet]) -> None:
        """Stores go into ``folder``, and what an earlier run left there is used again."""
        self._folder, self.sets = folder, sets
        folder.mkdir(parents=True, exist_ok=True)
        self._opened: dict[str, Store] = {}
        self._exits = ExitStack()

    def store(self, base: Path, *, plot_layers: int, window: int = 2) -> Store:
        """The store around the model in the folder ``base``."""
        name = f"{base_identity(base)}-k{plot_layers}-window{window}"
        if name not in self._opened:
            self._opened[name] = self._exits.enter_context(self._open(name, base, plot_layers, window))
        return self._opened[name]

    def _open(self, name: str, base: Path, plot_layers: int, window: int) -> Store:
        path = self._folder / name
        if path.exists():
            return Store.open(path)
        return Store.create(path, general=base, plot_layers=plot_layers, window=3 if window == 3 else 2)

    def shipped_base(self, plot_layers: int) -> Path:
        """Folder of the distilled base for K that the project brings along."""
        path = self._folder / f"{SHIPPED}-k{plot_layers}"
        if not path.exists():
            distilled = packaged_distillation(plot_layers)
            Store.create(path, general=packaged_model(), distilled=distilled).close()
        with Store.open(path, read_only=True) as store:
            return store.general_folder

    def fine_tuned(self, base: Path, labelled: StudySet, recipe: FineTuning, seed: int) -> Outcome:
        """Full fine-tuning; its model is kept, as a teacher of tenants."""
        path = self._teacher_folder(base, labelled, recipe, seed)
        with TemporaryDirectory(dir=self._folder) as folder:
            made = Path(folder) / "model"
            outcome = fine_tune(base, labelled, recipe, seed, save=made)
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                made.rename(path)
        return outcome

    def teacher(self, base: Path, labelled: StudySet, recipe: FineTuning, seed: int) -> Path:
        """Folder of the model that full fine-tuning makes, which is done now if it is not there."""
        path = self._teacher_folder(base, labelled, recipe, seed)
        if not path.exists():
            self.fine_tuned(base, labelled, recipe, seed)
        return path

    def _teacher_folder(self, base: Path, labelled: StudySet, recipe: FineTuning, seed: int) -> Path:
        name = f"{base_identity(base)}-{labelled.name}-lr{recipe.learning_rate:g}-seed{seed}"
        return self._folder / "teachers" / name

    def domain(self, store: Store, method: Hierarchical, labelled: StudySet) -> str:
        """Name of the domain of ``store`` with the table that a method needs on a set."""
        owner = "sets" if method.table == "all" else labelled.name
        name = f"{owner}-{method.table}-count{method.min_count}-{method.row_format}"
        if name not in store.domains:
            store.add_domain(
                name,
                iter(table_texts(method.table, labelled, self.sets)),
                min_count=method.min_count,
                row_format=None if method.row_format == "float16" else method.row_format,
                plot_bytes="1GiB",
            )
        return name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the stores."""
        self._exits.close()
