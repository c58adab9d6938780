"""A small base model's description, and stores, tables and tenants made for it."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hmi_engine.knowledge.adapters import (
    Adapter,
    BiasBlock,
    BottleneckBlock,
    LoraBlock,
    ScaleBlock,
    Site,
    random_adapter,
)
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.changes import NewTenant
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import (
    ClassificationHead,
    DenseLayer,
    EmbeddingHead,
    RegressionHead,
    TokenClassificationHead,
)
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.plot_table import PlotMetadata, PlotTable, text_digest
from hmi_kernels import plot_index_build


@pytest.fixture(scope="session")
def general() -> GeneralInfo:
    return GeneralInfo(
        family="bert",
        source="tiny-bert",
        num_layers=4,
        hidden_size=8,
        num_heads=2,
        intermediate_size=12,
        placeholder_token_id=4,
        vocab_size=50,
        max_positions=16,
        plot_layers=2,
        window=2,
        row_dtype="float16",
        tokenizer_sha256="0" * 64,
        domain_layers="base-layers",
    )


@pytest.fixture
def layout(tmp_path: Path) -> StoreLayout:
    layout = StoreLayout(tmp_path / "store")
    layout.general.mkdir(parents=True)
    (layout.general / "config.json").write_text('{"model_type": "bert"}')
    (layout.general / "vocabulary").mkdir()
    (layout.general / "vocabulary" / "words.txt").write_text("a\nb\n")
    return layout


@pytest.fixture
def catalog(layout: StoreLayout, general: GeneralInfo) -> Iterator[Catalog]:
    with Catalog.create(layout, general) as catalog:
        yield catalog


@pytest.fixture(scope="session")
def mixed_adapter(general: GeneralInfo) -> Adapter:
    """Blocks of all kinds, of several ranks, in an order that is not that of the file."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return Adapter(
        {
            (3, Site.VALUE): LoraBlock(normal(8, 3), normal(3, 8), 0.5),
            (3, Site.FFN_DOWN): LoraBlock(normal(12, 1), normal(1, 8), 2.0),
            (2, Site.FFN_UP): LoraBlock(normal(8, 2), normal(2, 12), -1.0),
            (2, Site.AFTER_FFN): BottleneckBlock(
                normal(8, 4), normal(4), normal(4, 8), normal(8), "gelu_tanh", 3.5
            ),
            (2, Site.AFTER_FFN_NORMALIZED): BottleneckBlock(
                normal(8, 5), normal(5), normal(5, 8), normal(8), "relu"
            ),
            (2, Site.FFN_DOWN_INPUT_SCALE): ScaleBlock(normal(12)),
            (3, Site.QUERY_BIAS): BiasBlock(normal(8)),
        }
    )


@pytest.fixture(scope="session")
def classification_head() -> ClassificationHead:
    return ClassificationHead(
        ("no", "yes", "naïve"), torch.randn(3, 8), torch.randn(3), "mean", multi_label=True
    )


def dense(activation: str | None) -> DenseLayer:
    return DenseLayer(torch.randn(8, 8), torch.randn(8), activation)


@pytest.fixture(scope="session")
def heads(classification_head: ClassificationHead) -> list[object]:
    return [
        classification_head,
        TokenClassificationHead(("O", "B"), torch.randn(2, 8), torch.randn(2)),
        EmbeddingHead("cls", normalize=False),
        EmbeddingHead("mean", True, DenseLayer(torch.randn(5, 8), torch.randn(5), None)),
        RegressionHead(("x",), torch.randn(1, 8), torch.randn(1), "pooler"),
        ClassificationHead(("a", "b"), torch.randn(2, 8), torch.randn(2), "cls", hidden=(dense("tanh"),)),
        TokenClassificationHead(
            ("O", "B"), torch.randn(2, 8), torch.randn(2), (dense("relu"), dense(None), dense("gelu"))
        ),
    ]


@pytest.fixture
def make_tenant(general: GeneralInfo, classification_head: ClassificationHead) -> Callable[..., NewTenant]:
    def make(name: str, seed: int = 0, domain: str = "general") -> NewTenant:
        return NewTenant(
            name, domain, random_adapter(general, "lora", 2, seed), classification_head, {"seed": seed}
        )

    return make


@pytest.fixture
def make_table(general: GeneralInfo) -> Callable[..., PlotTable]:
    def make(keys: list[int], *, unigrams: bool = False, seed: int = 0) -> PlotTable:
        generator = torch.Generator().manual_seed(seed)
        row_keys = torch.tensor(keys, dtype=torch.int64)
        return PlotTable(
            index=plot_index_build(row_keys),
            rows=torch.randn(len(keys), 2, 8, generator=generator).half(),
            row_keys=row_keys,
            row_counts=torch.arange(len(keys), 0, -1),
            unigrams=torch.randn(50, 3, 8, generator=generator).half() if unigrams else None,
            documents=torch.tensor(sorted(map(text_digest, ("first text", "second text")))),
            metadata=PlotMetadata(
                family="bert",
                window=general.window,
                plot_layers=general.plot_layers,
                hidden_size=general.hidden_size,
                placeholder_token_id=general.placeholder_token_id,
                vocab_size=general.vocab_size,
                row_dtype=general.row_dtype,
                row_format=general.row_dtype,
                layer_identity=general.domain_layers,
                corpus_tokens=7,
                min_count=1,
                admission_count=1 if keys else 0,
            ),
        )

    return make


@pytest.fixture
def run_in_child() -> Callable[[Callable[[], object]], int]:
    """Runs a function in a forked process and returns its exit code (70 after an exception)."""

    def run(function: Callable[[], object]) -> int:
        child = os.fork()
        if child == 0:
            try:
                function()
            except BaseException:
                os._exit(70)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False, text=True)
    except OSError as error:
        pytest.skip(f"mount cannot be run: {error}")
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
