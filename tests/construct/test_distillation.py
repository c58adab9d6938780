"""Distillation: the student computes what serves, learns, resumes exactly, and says what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertModel

import hmi_engine as hmi
from hmi_engine.construct.distillation import distil
from hmi_engine.construct.distillation_corpus import DistillationCorpus, Misses, read_pieces
from hmi_engine.construct.distillation_settings import DistillationSettings, StageSettings
from hmi_engine.construct.distillation_stage import draw_misses
from hmi_engine.construct.distillation_student import DenseShape, Student, load_bert, run_layers
from hmi_engine.construct.distillation_teacher import Teacher
from hmi_engine.construct.distillation_windows import plan_merge
from hmi_engine.errors import (
    CheckpointError,
    CorpusError,
    DeviceMemoryError,
    TrainingDivergedError,
    UnsupportedModelError,
)
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.models.loading import load_merge
from hmi_engine.models.packing import PackedSequences

PLOT_LAYERS = 2
MASK = 4


def settings(**changes) -> DistillationSettings:
    """A few quick steps."""
    values = {
        "stage_1": StageSettings(steps=4, trainable=("domain", "merge"), merged_weight=1.0),
        "stage_2": StageSettings(
            steps=4, trainable=("merge", "upper"), upper_weight=1.0, final_weight=1.0, relation_weight=0.1
        ),
        "batch_tokens": 128,
        "max_tokens": 16,
        "held_out_fraction": 0.1,
        "evaluate_every": 2,
        "checkpoint_every": 2,
    }
    return DistillationSettings(**(values | changes))


@pytest.fixture(params=[2, 3])
def window_store(request, tiny_bert: Path, tmp_path: Path, corpus: list[str]):
    """A store of each window width with one domain, rows in float32."""
    with hmi.Store.create(
        tmp_path / "windows",
        general=tiny_bert,
        plot_layers=PLOT_LAYERS,
        window=request.param,
        row_dtype="float32",
    ) as opened:
        opened.add_domain("words", corpus, min_count=3)
        yield opened


def student_of(store: hmi.Store) -> Student:
    folder = store.layout.general
    return Student(load_bert(folder), load_merge(folder), PLOT_LAYERS)


def served_misses(plots, domain: str, sequences: PackedSequences, window: int) -> Misses:
    """Which n-grams the store's tables lack, looked up pair by pair where the kernel does not say."""
    whole = plots.lookup(sequences, [domain] * sequences.num_sequences)[:, 0] < 0
    if window == 2:
        last = sequences.offsets[1:] - 1
        whole[last] = False
        return Misses(whole, whole)
    pairs = torch.zeros_like(whole)
    ids = sequences.input_ids.tolist()
    for start, end in zip(sequences.offsets.tolist(), sequences.offsets[1:].tolist(), strict=False):
        for t in range(start, end - 1):
            pair = PackedSequences.pack([[ids[t], ids[t + 1]]])
            pairs[t] = plots.lookup(pair, [domain])[0, 0] < 0  # the window at the first token is that bigram
    return Misses(pairs, whole)


@torch.no_grad()
def test_the_student_computes_what_the_store_serves(window_store: hmi.Store, held_out: list[str]) -> None:
    """Rows looked up and merged by the kernels, and the upper layers over packed tokens, to 1e-5."""
    store, window = window_store, window_store.general.window
    sequences = PackedSequences.pack(store.encoder.token_ids(held_out))
    library = PlotLibrary(store.layout, store.catalog, store.general, domain_layers=store.domain_layers)
    with library.reading(["words"]) as plots:
        misses = served_misses(plots, "words", sequences, window)
        references = plots.lookup(sequences, ["words"] * sequences.num_sequences)
        served = plots.merge(store.model, sequences, ["words"] * sequences.num_sequences, references)
    assert 0 < int(misses.windows.sum()) < sequences.num_tokens - sequences.num_sequences
    student = student_of(store)
    plan = plan_merge(sequences, misses, window, MASK)
    dense = DenseShape(sequences, torch.device("cpu"))
    merged = student.merge(student.window_rows(plan), plan, dense.positions())
    torch.testing.assert_close(merged, served, atol=1e-5, rtol=1e-5)
    final = run_layers(student.upper_layers, merged, dense)[-1]
    served_final = store.model.run_layers(served.clone(), sequences, first=PLOT_LAYERS)
    torch.testing.assert_close(final, served_final, atol=1e-5, rtol=1e-5)


def run(store: hmi.Store, texts, chosen: DistillationSettings, **options):
    return distil(
        texts,
        base=store.layout.general,
        general=store.general,
        encoder=store.encoder,
        settings=chosen,
        **options,
    )


def assert_same(first, second) -> None:
    for name in ("layers", "merge"):
        ours, theirs = getattr(first, name), getattr(second, name)
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, theirs[key]), key


class Interruption(Exception):
    """Stands for Ctrl-C."""


def interrupt_at(stage: str, step: int):
    def progress(name: str, done: int, total, metrics=None) -> None:
        if (name, done) == (stage, step):
            raise Interruption

    return progress


@pytest.mark.parametrize(
    ("stage", "step"), [("distilling, stage 1", 1), ("distilling, stage 1", 3), ("distilling, stage 2", 3)]
)
def test_what_was_interrupted_goes_on_to_the_same_bits(store, tmp_path, corpus, stage, step) -> None:
    """Before the first checkpoint, and one step after one in either stage."""
    whole = run(store, corpus, settings(), folder=tmp_path / "whole")
    with pytest.raises(Interruption):
        run(store, corpus, settings(), folder=tmp_path / "cut", progress=interrupt_at(stage, step))
    resumed = run(store, corpus, settings(), folder=tmp_path / "cut")
    assert_same(whole, resumed)
    for ours, theirs in zip(whole.report.stages, resumed.report.stages, strict=True):
        assert (ours.losses, ours.held_out) == (theirs.losses, theirs.held_out)


def test_nothing_depends_on_what_is_cached(store, tmp_path, corpus) -> None:
    kept = run(store, corpus, settings(), folder=tmp_path / "kept")
    some = run(store, corpus, settings(cache_bytes=100_000))
    none = run(store, corpus, settings(cache_bytes=0))
    for other in (some, none):
        for name, tensor in kept.layers.items():
            torch.testing.assert_close(tensor, other.layers[name], atol=1e-5, rtol=1e-4)
