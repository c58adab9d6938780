"""Distillation: the student computes what serves, learns, resumes exactly, and says what is wrong."""

from itertools import pairwise
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
    HmiError,
    TrainingDivergedError,
    TrainingMemoryError,
)
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.models.general_folder import load_merge
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
    ("stage", "step"),
    [
        pytest.param("distilling, stage 1", 1, marks=pytest.mark.slow),
        ("distilling, stage 1", 3),
        ("distilling, stage 2", 3),
    ],
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


def test_where_the_disk_was_full_it_goes_on_with_less_to_the_same_bits(store, tmp_path, corpus) -> None:
    """The teacher's states are removed and get less room; rows that were written are still read."""
    whole = run(store, corpus, settings(), folder=tmp_path / "whole")
    cut = tmp_path / "cut"
    with pytest.raises(Interruption):
        run(store, corpus, settings(), folder=cut, progress=interrupt_at("distilling, stage 2", 3))
    for states in cut.glob("teacher-*.states"):
        states.unlink()
    less = settings(cache_bytes=10_000, checkpoint_every=1)
    resumed = run(store, corpus, less, folder=cut)
    assert_same(whole, resumed)
    for ours, theirs in zip(whole.report.stages, resumed.report.stages, strict=True):
        assert (ours.losses, ours.held_out) == (theirs.losses, theirs.held_out)
    with pytest.raises(CheckpointError, match="cache_bytes was 10000, is 20000"):
        run(store, corpus, settings(cache_bytes=20_000), folder=cut)


def test_nothing_depends_on_what_is_cached(store, tmp_path, corpus) -> None:
    kept = run(store, corpus, settings(), folder=tmp_path / "kept")
    some = run(store, corpus, settings(cache_bytes=100_000))
    none = run(store, corpus, settings(cache_bytes=0))
    for other in (some, none):
        for name, tensor in kept.layers.items():
            torch.testing.assert_close(tensor, other.layers[name], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_teacher_is_transformers(store, held_out) -> None:
    """Hidden states of padded batches, rounded to float16, against each text alone."""
    token_ids = store.encoder.token_ids(held_out)
    corpus = DistillationCorpus([ids for ids in token_ids if len(ids) > 3], 2, settings())
    reference = BertModel.from_pretrained(store.layout.general).eval()
    teacher = Teacher(load_bert(store.layout.general), PLOT_LAYERS, torch.device("cpu"))
    for batch in corpus.batches:
        found = [teacher.merged(batch), *teacher.upper(batch)]
        for number, ids in enumerate(batch.sequences.input_ids.split(batch.sequences.lengths)):
            expected = reference(ids[None].long(), output_hidden_states=True).hidden_states[PLOT_LAYERS:]
            for ours, theirs in zip(found, expected, strict=True):
                part = ours.split(batch.sequences.lengths)[number].float()
                torch.testing.assert_close(part, theirs[0], atol=5e-3, rtol=5e-3)


def test_distillation_teaches(store, corpus) -> None:
    """Both stages lower the loss on held-out text, under both policies, from a merge that fits nothing."""
    chosen = settings(
        stage_1=StageSettings(
            steps=60,
            trainable=("domain", "merge"),
            merged_weight=1.0,
            learning_rate=3e-3,
            merge_learning_rate=1e-2,
        ),
        stage_2=StageSettings(steps=60, trainable=("merge", "upper"), upper_weight=1.0, learning_rate=3e-3),
        evaluate_every=1000,
        checkpoint_every=1000,
    )
    report = run(store, corpus, chosen).report
    first, second = report.stages
    for policy in ("exact", "backoff"):
        before, between = (getattr(point, policy) for point in (first.held_out[0], first.held_out[-1]))
        assert between[0] < before[0] * 0.8
        start, end = (getattr(point, policy) for point in (second.held_out[0], second.held_out[-1]))
        assert end[-1] < start[-1] * 0.8


def test_a_stage_changes_only_its_parts(store, corpus) -> None:
    general = load_file(store.layout.general / "model.safetensors")
    nothing = StageSettings(steps=0, trainable=("upper",), upper_weight=1.0)
    first = run(store, corpus, settings(stage_2=nothing))
    only_upper = StageSettings(steps=2, trainable=("upper",), upper_weight=1.0)
    none = StageSettings(steps=0, trainable=("merge",), merged_weight=1.0)
    second = run(store, corpus, settings(stage_1=none, stage_2=only_upper))
    merge = load_merge(store.layout.general)
    assert all(torch.equal(second.merge[name], tensor) for name, tensor in merge.items())
    for model, is_trained in (
        (first, lambda layer: layer < PLOT_LAYERS),
        (second, lambda layer: layer >= PLOT_LAYERS),
    ):
        for name, tensor in model.layers.items():
            if name.endswith("weight"):
                changed = not torch.equal(tensor, general[name])
                assert changed == is_trained(int(name.split(".")[2])), name


def brute_force_misses(corpus, pieces, held_out_ids, folds: int, min_count: int) -> dict:
    """For each piece (as a tuple) which of its pairs occur too rarely in other folds' pieces."""
    result = {}
    fold_of = [number * folds // len(pieces) for number in range(len(pieces))]
    for number, piece in enumerate(pieces):
        own = None if tuple(piece) in held_out_ids else fold_of[number]
        others = [
            other
            for place, other in enumerate(pieces)
            if tuple(other) not in held_out_ids and fold_of[place] != own
        ]
        seen: dict = {}
        for other in others:
            for pair in pairwise(other):
                seen[pair] = seen.get(pair, 0) + 1
        result[tuple(piece)] = [seen.get(pair, 0) < min_count for pair in pairwise(piece)]
    return result


def test_cross_fitted_misses_are_what_other_folds_lack(store, corpus) -> None:
    pieces, _ = read_pieces(corpus[:40], store.encoder, 16)
    pieces = list(map(list, dict.fromkeys(map(tuple, pieces))))
    chosen = settings(folds=3, min_count=2)
    found = DistillationCorpus(pieces, 2, chosen)
    held_out = {
        tuple(ids.tolist())
        for batch in found.held_out
        for ids in batch.sequences.input_ids.split(batch.sequences.lengths)
    }
    expected = brute_force_misses(corpus, pieces, held_out, 3, 2)
    seen = 0
    for batch in found.training + found.held_out:
        parts = zip(
            batch.sequences.input_ids.split(batch.sequences.lengths),
            batch.misses.pairs.split(batch.sequences.lengths),
            strict=True,
        )
        for ids, missing in parts:
            assert missing.tolist() == [*expected[tuple(ids.tolist())], False]
            seen += 1
    assert seen == len(pieces)
    assert sum(map(sum, expected.values())) > 0


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("misses", ["cross_fitted", "uniform", "none"])
def test_misses_are_drawn_within_their_range(store, corpus, window, misses) -> None:
    pieces, _ = read_pieces(corpus, store.encoder, 16)
    chosen = settings(misses=misses, miss_range=(0.5, 0.5) if misses == "uniform" else (1.0, 1.0))
    found = DistillationCorpus(pieces, window, chosen)
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_misses(batch, window, chosen, generator) for batch in found.training]
    windows = torch.cat([one.windows for one in drawn])
    if misses == "none":
        assert not windows.any()
    elif misses == "uniform":
        assert windows.float().mean() == pytest.approx(0.5, abs=0.05)
    else:
        assert torch.equal(windows, torch.cat([batch.misses.windows for batch in found.training]))


def test_long_texts_become_pieces_that_cover_them(store) -> None:
    text = " ".join(["cell", "protein", "binds", "the"] * 10)
    pieces, count = read_pieces([text, text], store.encoder, 16)
    whole = store.encoder.token_ids([text], whole=True)[0]
    assert count == 1
    assert [token for piece in pieces for token in piece[1:-1]] == whole[1:-1]
    assert all(piece[0] == whole[0] and piece[-1] == whole[-1] and len(piece) <= 16 for piece in pieces)


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "0 sequences"), (["a", ""], "none of the corpus' 2 texts"), (["a cell binds"], "1 sequences")],
)
def test_too_little_text_is_refused(store, texts, message) -> None:
    with pytest.raises(CorpusError, match=message):
        run(store, texts, settings())


def test_a_nan_loss_stops_and_keeps_the_last_good_state(store, tmp_path, corpus, monkeypatch) -> None:
    """The checkpoint before it stays; step and batch are told."""
    calls = []
    original = Student.window_rows

    def poisoned(self, plan):
        calls.append(torch.is_grad_enabled())
        rows = original(self, plan)
        return rows * float("nan") if sum(calls) == 4 else rows

    monkeypatch.setattr(Student, "window_rows", poisoned)
    with pytest.raises(TrainingDivergedError, match=r"loss of step 4 of stage 1 is nan \(batch \d+"):
        run(store, corpus, settings(), folder=tmp_path)
    kept = load_file(tmp_path / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 1 bytes")]
)
def test_out_of_memory_names_the_setting(store, corpus, monkeypatch, error) -> None:
    original = Student.window_rows

    def full(self, plan):
        if torch.is_grad_enabled():
            raise error
        return original(self, plan)

    monkeypatch.setattr(Student, "window_rows", full)
    with pytest.raises(TrainingMemoryError, match=r"batch_tokens=64 .*gradient_accumulation=2"):
        run(store, corpus, settings())


@pytest.fixture
def interrupted(store, tmp_path, corpus) -> Path:
    with pytest.raises(Interruption):
        run(
            store,
            corpus,
            settings(),
            folder=tmp_path / "cut",
            progress=interrupt_at("distilling, stage 1", 3),
        )
    return tmp_path / "cut" / "checkpoint.safetensors"


def test_a_checkpoint_goes_on_only_as_it_began(store, corpus, interrupted) -> None:
    with pytest.raises(CheckpointError, match="seed was 0, is 1"):
        run(store, corpus, settings(seed=1), folder=interrupted.parent)
    with pytest.raises(CheckpointError, match="data_sha256 was"):
        run(store, corpus[:-1], settings(), folder=interrupted.parent)


@pytest.mark.parametrize("keep", [0, 7, 300, -10])
def test_a_damaged_checkpoint_is_told(store, corpus, interrupted, keep) -> None:
    contents = interrupted.read_bytes()
    interrupted.write_bytes(contents[:keep])
    with pytest.raises(CheckpointError, match="checkpoint"):
        run(store, corpus, settings(), folder=interrupted.parent)


def test_settings_that_learn_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a loss"):
        StageSettings(steps=1, trainable=("merge",))
    with pytest.raises(ValueError, match="losses above the merge"):
        StageSettings(steps=1, trainable=("upper",), merged_weight=1.0)
    with pytest.raises(ValueError, match="0 steps"):
        settings(
            stage_1=StageSettings(steps=0, trainable=("merge",), merged_weight=1.0),
            stage_2=StageSettings(steps=0, trainable=("merge",), merged_weight=1.0),
        )
    with pytest.raises(ValueError, match="miss_range"):
        settings(miss_range=(0.5, 0.2))


def test_accumulated_gradients_make_the_step_of_both_batches(store, corpus) -> None:
    """Two batches to a step halve what each adds: the mean of both losses is what a step reports."""
    no_misses = {"misses": "none", "checkpoint_every": 100, "evaluate_every": 100}
    once = run(store, corpus, settings(**no_misses)).report.stages[0].losses
    both = run(store, corpus, settings(**no_misses, gradient_accumulation=2)).report.stages[0].losses
    assert both[0] != pytest.approx(once[0])
    assert len(both) == len(once) == 4


@pytest.mark.parametrize("precision", ["bf16"])
def test_mixed_precision_learns_about_the_same(store, corpus, precision) -> None:
    exact = run(store, corpus, settings()).report.stages[0].losses
    mixed = run(store, corpus, settings(mixed_precision=precision)).report.stages[0].losses
    assert mixed == pytest.approx(exact, rel=0.05)
    assert mixed != exact


def test_the_accelerator_of_others_keeps_its_precision(store, corpus) -> None:
    """All in a process share accelerate's state: another precision is refused, and theirs stays."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    theirs = Accelerator(mixed_precision="no")
    try:
        with pytest.raises(HmiError, match="no mixed_precision='bf16' here; something else in this process"):
            run(store, corpus, settings(mixed_precision="bf16"))
        assert run(store, corpus, settings()).report.stages[0].losses
        assert theirs.mixed_precision == "no"
    finally:
        AcceleratorState._reset_state()
