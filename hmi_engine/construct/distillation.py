"""Turns a base model into hierarchical form by layer-wise distillation on unlabelled text.

Method: "SkipBERT" (Wang et al., ACL 2022): the domain layers and the merge learn what the base's layers 0 to
K-1 make of whole sequences; then the upper layers learn to work on that. See docs/distillation.md.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hmi_engine.construct.distillation_checkpoint import Checkpoint, StageState, Task
from hmi_engine.construct.distillation_corpus import DistillationCorpus, read_pieces
from hmi_engine.construct.distillation_rows import CorpusRows
from hmi_engine.construct.distillation_settings import (
    DistillationProgress,
    DistillationReport,
    DistillationSettings,
    StageReport,
)
from hmi_engine.construct.distillation_stage import StageTrainer
from hmi_engine.construct.distillation_student import Student, load_bert
from hmi_engine.construct.distillation_teacher import Teacher
from hmi_engine.construct.distilled_model import DistilledModel, weights_sha256
from hmi_engine.errors import HmiError, MissingDependencyError, UnsupportedModelError
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.tensor_file import file_sha256
from hmi_engine.models.bert_loading import load_bert_configuration, load_bert_tensors
from hmi_engine.models.general_folder import load_merge
from hmi_engine.models.tokenization import TextEncoder

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["distil"]

FIRST_SHIFTED = 8
"""Positions whose mean shift stands for those that no text reached: the very first tokens are special."""


def distil(
    texts: Iterable[str],
    *,
    base: Path,
    teacher: Path | None = None,
    general: GeneralInfo,
    encoder: TextEncoder,
    settings: DistillationSettings,
    domain: str | None = None,
    domain_layers: dict[str, Tensor] | None = None,
    folder: Path | None = None,
    progress: DistillationProgress | None = None,
) -> DistilledModel:
    """Distils a base model; the store that it comes from is not touched.

    Args:
        texts: unlabelled text.
        base: a store's folder of the base model, from which the student starts.
        teacher: folder of a model of the same sizes, which teaches; by default ``base``.
        general: its description.
        encoder: its tokenizer.
        settings: see :class:`DistillationSettings`.
        domain: whose layers are learned, for the checkpoint; None for the general knowledge.
        domain_layers: weights that the student's domain layers start from instead of the base's.
        folder: for checkpoints and cached states; a distillation that was interrupted goes on from what is
            there. None: a temporary folder, nothing is kept.
        progress: told about the work.

    Raises:
        UnsupportedModelError: the store has no domain layers (K = 0).
        CorpusError: no text, or none that is long enough.
        CheckpointError: ``folder`` holds a damaged checkpoint, or one of another distillation.
        TrainingDivergedError: a loss is no number.
        TrainingMemoryError: a step does not fit into memory.
        StoreFullError: no room for checkpoints and cached states.
        MissingDependencyError: ``accelerate`` is not installed.
        HmiError: something else has set it up in this process for another precision.
    """
    if not general.plot_layers:
        raise UnsupportedModelError(
            "the store has no domain layers (plot_layers is 0), so there is nothing to distil; make one with "
            "`hmi init --plot-layers K`"
        )
    started = time.perf_counter()
    with _accelerator(settings) as accelerator:
        pieces, num_texts = read_pieces(texts, encoder, settings.max_tokens)
        corpus = DistillationCorpus(pieces, general.window, settings)
        teacher = teacher or base
        teacher_sha256 = weights_sha256(load_bert_tensors(teacher, load_bert_configuration(teacher)))
        task = Task(
            base_sha256=_base_sha256(base, domain_layers),
            teacher_sha256=None if teacher == base else teacher_sha256,
            data_sha256=corpus.sha256,
            plot_layers=general.plot_layers,
            window=general.window,
            domain=domain,
            processes=accelerator.num_processes,
            settings=settings.model_dump(mode="json"),
        )
        bert = load_bert(base)
        student = Student(bert, load_merge(base), general.plot_layers)
        _start_from(student, domain_layers)
        student.to(accelerator.device)
        with _work_folder(folder) as work:
            run = _Run(general, corpus, student, teacher, work, task, settings, accelerator, progress)
            stages = run.all_stages()
    report = DistillationReport(
        plot_layers=general.plot_layers,
        window=general.window,
        teacher_sha256=teacher_sha256,
        tokenizer_sha256=general.tokenizer_sha256,
        texts=num_texts,
        pieces=sum(batch.sequences.num_sequences for batch in corpus.training),
        tokens=sum(batch.sequences.num_tokens for batch in corpus.training),
        held_out_pieces=sum(batch.sequences.num_sequences for batch in corpus.held_out),
        held_out_tokens=sum(batch.sequences.num_tokens for batch in corpus.held_out),
        held_out_miss_rate=corpus.held_out_miss_rate(),
        data_sha256=corpus.sha256,
        settings=settings,
        stages=tuple(
            StageReport(losses=tuple(s.losses), held_out=tuple(s.held_out), seconds=s.seconds) for s in stages
        ),
        seconds=max(time.perf_counter() - started, sum(state.seconds for state in stages)),
    )
    longest = max(batch.sequences.lengths[-1] for batch in corpus.training)
    return DistilledModel(_layers(student), _merge(student, load_merge(base), longest), report)


class _Run:
    """Both stages over one corpus."""

    def __init__(
        self,
        general: GeneralInfo,
        corpus: DistillationCorpus,
        student: Student,
        teacher: Path,
        folder: Path,
        task: Task,
        settings: DistillationSettings,
        accelerator: Accelerator,
        progress: DistillationProgress | None,
    ) -> None:
        self._general, self._corpus, self._student = general, corpus, student
        self._folder, self._settings, self._progress = folder, settings, progress
        self._accelerator = accelerator
        self._checkpoint = Checkpoint(folder, task)
        self._teacher = Teacher(load_bert(teacher), general.plot_layers, accelerator.device)
        label = _label(task, corpus)
        self._cache_bytes = settings.cache_bytes if accelerator.num_processes == 1 else 0
        self._teacher.keep_states(folder, label, corpus.batches, self._cache_bytes * 3 // 4)

    def all_stages(self) -> list[StageState]:
        """Runs what is not done yet."""
        stages, optimizer_tensors = self._checkpoint.load(self._student)
        for number, stage in enumerate(self._settings.stages):
            if not stage.steps:
                if len(stages) == number:
                    stages.append(StageState())
                continue
            if len(stages) > number and len(stages[number].losses) == stage.steps:
                continue
            trainer = self._trainer(number)
            if len(stages) == number:
                stages.append(StageState())
            else:
                Checkpoint.restore_optimizer(trainer.optimizer, optimizer_tensors)
            save = functools.partial(trainer.checkpoint, self._checkpoint, stages)
            trainer.run(stages[number], save, self._progress)
        return stages

    def _trainer(self, number: int) -> StageTrainer:
        settings = self._settings
        assert self._general.placeholder_token_id is not None  # a store with domain layers has one
        rows = None
        if "domain" not in settings.stages[number].trainable:
            rows = CorpusRows(self._student, self._general.window, self._accelerator.device)
            rows.fill(
                self._folder,
                self._corpus.batches,
                self._general.placeholder_token_id,
                self._cache_bytes // 4,
                all_missing=settings.misses == "uniform",
                progress=self._progress,
            )
        return StageTrainer(
            number,
            self._student,
            self._teacher,
            self._corpus,
            rows,
            self._general.placeholder_token_id,
            settings,
            self._accelerator,
        )


@contextmanager
def _accelerator(settings: DistillationSettings) -> Iterator[Accelerator]:
    """Sets accelerate up, which has one state for the process, and leaves that as it was found.

    So the next distillation in this process may have another precision.

    Raises:
        HmiError: others have set it up for another precision, or the processor has not this one.
        MissingDependencyError: it is not installed.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, is_initialized
    except ImportError as error:
        raise MissingDependencyError(
            "distillation needs `accelerate`, which is not installed; run `pip install 'hmi[train]'`"
        ) from error
    is_of_others = is_initialized()
    try:
        try:
            accelerator = Accelerator(
                mixed_precision=settings.mixed_precision,
                gradient_accumulation_steps=settings.gradient_accumulation,
            )
        except ValueError as error:
            advice = (
                "something else in this process uses it: distil in another one" if is_of_others else error
            )
            raise HmiError(
                f"accelerate takes no mixed_precision={settings.mixed_precision!r} here; {advice}"
            ) from error
        yield accelerator
    finally:
        if not is_of_others:
            AcceleratorState._reset_state()


@contextmanager
def _work_folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="hmi-distil-") as temporary:
        yield Path(temporary)


def _base_sha256(base: Path, domain_layers: dict[str, Tensor] | None) -> str:
    """Of all that the student starts from."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "merge.safetensors"):
        digest.update(file_sha256(base / name).encode())
    for name, tensor in sorted((domain_layers or {}).items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _label(task: Task, corpus: DistillationCorpus) -> str:
    """Of the teacher's cached states: model, K, and the batches."""
    teacher = task.teacher_sha256 or task.base_sha256
    digest = hashlib.sha256(json.dumps([teacher, task.plot_layers]).encode())
    for batch in corpus.batches:
        digest.update(batch.sequences.input_ids.numpy().tobytes())
        digest.update(batch.sequences.offsets.numpy().tobytes())
    return digest.hexdigest()[:16]


def _start_from(student: Student, domain_layers: dict[str, Tensor] | None) -> None:
    if domain_layers is None:
        return
    parameters = dict(student.parts("domain"))
    with torch.no_grad():
        for name, tensor in domain_layers.items():
            parameters[f"bert.{name}"].copy_(tensor)


def _layers(student: Student) -> dict[str, Tensor]:
    parts = [*student.parts("domain"), *student.parts("upper")]
    return {name.removeprefix("bert."): tensor.detach().cpu().contiguous() for name, tensor in parts}


def _merge(student: Student, before: dict[str, Tensor], longest: int) -> dict[str, Tensor]:
    """The merge's tensors; positions that no text reached are shifted as the others were on average."""
    positions = student.merge.position_embeddings.detach().cpu().clone()
    if longest < len(positions):
        known = slice(min(FIRST_SHIFTED, longest - 1), longest)
        shift = (positions[known] - before["position_embeddings"][known]).mean(0)
        positions[longest:] = before["position_embeddings"][longest:] + shift
    return {
        "position_embeddings": positions,
        "layer_norm.weight": student.merge.layer_norm.weight.detach().cpu().clone(),
        "layer_norm.bias": student.merge.layer_norm.bias.detach().cpu().clone(),
    }
