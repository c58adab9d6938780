"""Row formats against their bounds, and codebooks against scikit-learn's k-means."""

from __future__ import annotations

import builtins
from typing import Any

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

import hmi_kernels
from hmi_engine.construct.row_encoding import SAMPLE_ROWS, RowEncoder
from hmi_engine.errors import MissingDependencyError, UnsupportedModelError
from hmi_engine.knowledge.row_formats import ROW_FORMATS, RowFormat, stored_shapes


def some_rows(num_rows: int, *, window: int = 2, hidden_size: int = 16, seed: int = 0) -> Tensor:
    """Rows near a few directions, as hidden states are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(4, window * hidden_size, generator=generator)
    rows = torch.randn(num_rows, 4, generator=generator) @ mix
    noise = torch.randn(num_rows, window * hidden_size, generator=generator)
    return (rows + 0.1 * noise).view(num_rows, window, hidden_size)


def squared_error(encoder: RowEncoder, rows: Tensor) -> float:
    return float((encoder.decode(encoder.encode(rows)) - rows).pow(2).mean())


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_tensors_are_those_of_the_format(row_format: RowFormat) -> None:
    rows = some_rows(600)
    encoder = RowEncoder.fit(rows, row_format)
    encoded = encoder.encode(rows)
    found = {"rows": encoded.rows, "row_scales": encoded.row_scales, "codebooks": encoder.codebooks}
    described = {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items() if tensor is not None
    }
    assert described == stored_shapes(row_format, 600, 2, 16)
    assert encoder.decode(encoded).shape == rows.shape
    assert len(encoder.encode(rows[:0]).rows) == 0


@pytest.mark.parametrize("row_format", ROW_FORMATS)
def test_a_row_is_encoded_the_same_whatever_comes_with_it(row_format: RowFormat) -> None:
    rows = some_rows(600)
    encoder = RowEncoder.from_codebooks(row_format, RowEncoder.fit(rows, row_format).codebooks)
    together = encoder.encode(rows)
    for part in (slice(0, 1), slice(7, 300), slice(599, 600)):
        alone = encoder.encode(rows[part])
        assert torch.equal(alone.rows, together.rows[part])
        if together.row_scales is not None and alone.row_scales is not None:
            assert torch.equal(alone.row_scales, together.row_scales[part])


@pytest.mark.parametrize("row_format", ROW_FORMATS)
@pytest.mark.parametrize("window", [2, 3])
def test_what_is_decoded_is_what_a_merge_reads(row_format: RowFormat, window: int) -> None:
    """The windows of one text; the same merge of the decoded rows must give the same states."""
    rows = some_rows(300, window=window)
    encoder = RowEncoder.fit(rows, row_format)
    encoded = encoder.encode(rows)
    references = torch.full((300, 1 if window == 2 else 3), -1)
    references[:, 0] = torch.arange(300)

    def merge(table: Tensor, **companions: Any) -> Tensor:
        return hmi_kernels.plot_merge(
            torch.zeros(300, dtype=torch.int32),
            torch.tensor([0, 300]),
            references,
            [table],
            [torch.zeros(1, 3, 16)],
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(300, 16),
            torch.ones(16),
            torch.zeros(16),
            layer_norm_eps=1e-5,
            window=window,
            **companions,
        )

    companions: dict[str, list[Tensor]] = {}
    if encoded.row_scales is not None:
        companions["row_scales"] = [encoded.row_scales]
    if encoder.codebooks is not None:
        companions["codebooks"] = [encoder.codebooks]
    expected = merge(encoder.decode(encoded))
    torch.testing.assert_close(merge(encoded.rows, **companions), expected, rtol=1e-4, atol=1e-4)


def test_floats_and_int8_lose_what_they_may() -> None:
    rows = some_rows(50)
    for row_format, bound in (("float32", 0.0), ("float16", 2.0**-11)):
        encoder = RowEncoder.fit(rows, row_format)
        lost = (encoder.decode(encoder.encode(rows)) - rows).abs()
        assert bool((lost <= bound * rows.abs() + 2.0**-25).all())
    encoder = RowEncoder.fit(rows, "int8")
    lost = (encoder.decode(encoder.encode(rows)) - rows).abs()
    assert bool((lost <= rows.abs().amax(dim=2, keepdim=True) / 127 * 0.5001).all())


@pytest.mark.parametrize(("row_format", "elements"), [("pq8", 4), ("pq16", 8)])
def test_codebooks_are_as_good_as_another_k_means(row_format: RowFormat, elements: int) -> None:
    rows = some_rows(1500)
    encoder = RowEncoder.fit(rows, row_format, seed=1)
    for slot in range(2):
        for place in range(16 // elements):
            piece = rows[:, slot, place * elements : (place + 1) * elements]
            other = KMeans(256, init="random", n_init=1, max_iter=10, random_state=0).fit(piece.numpy())
            decoded = encoder.decode(encoder.encode(rows))[:, slot, place * elements : (place + 1) * elements]
            assert float((decoded - piece).pow(2).sum()) <= 1.1 * other.inertia_
    assert encoder.codebooks is not None


def test_the_nearest_piece_is_taken() -> None:
    rows = some_rows(700)
    encoder = RowEncoder.fit(rows, "pq8")
    assert encoder.codebooks is not None
    pieces = rows.unflatten(2, (-1, 4)).transpose(0, 2).transpose(0, 1)  # [W, M, N, 4]
    distances = torch.cdist(pieces.double(), encoder.codebooks.double())
    chosen = encoder.encode(rows).rows.permute(1, 2, 0).long()
    found = distances.gather(3, chosen.unsqueeze(3)).squeeze(3)
    torch.testing.assert_close(found, distances.amin(dim=3), rtol=1e-5, atol=1e-5)


def test_few_rows_are_kept_as_halves() -> None:
    rows = some_rows(200)
    assert squared_error(RowEncoder.fit(rows, "pq8"), rows) <= float(
        (rows.half().float() - rows).pow(2).mean()
    )


def test_absent_slots_take_no_pieces() -> None:
    rows = some_rows(500)
    rows[:, 1] = 0.0
    rows[:200, 1] = some_rows(200, seed=5)[:, 1]
    encoder = RowEncoder.fit(rows, "pq16")
    decoded = encoder.decode(encoder.encode(rows))[:200, 1]
    torch.testing.assert_close(decoded, rows[:200, 1].half().float())


def test_training_is_decided_by_its_seed() -> None:
    rows = some_rows(1000)
    first, again, other = (RowEncoder.fit(rows, "pq8", seed=seed).codebooks for seed in (3, 3, 4))
    assert first is not None and again is not None and other is not None
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_no_more_than_the_sample_is_used() -> None:
    rows = some_rows(SAMPLE_ROWS + 5, window=1, hidden_size=8)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
    unused = rows.clone()
    unused[order[SAMPLE_ROWS:]] = 1e6
    books = [RowEncoder.fit(given, "pq16", seed=2).codebooks for given in (rows, unused)]
    assert books[0] is not None and books[1] is not None and torch.equal(books[0], books[1])


def test_what_does_not_fit_is_refused() -> None:
    rows = some_rows(300)
    books = RowEncoder.fit(rows, "pq8").codebooks
    assert books is not None
    for message, row_format, codebooks in (
        ("pq8 needs codebooks", "pq8", None),
        ("int8 has no codebooks", "int8", books),
        (r"pq16 must be float16 \[2, 2, 256, 8\], not torch.float16 \[2, 4, 256, 4\]", "pq16", books),
        ("must be float16", "pq8", books.float()),
    ):
        with pytest.raises(ValueError, match=message):
            RowEncoder.from_codebooks(row_format, codebooks)  # type: ignore[arg-type]
    encoder = RowEncoder.from_codebooks("pq8", books)
    with pytest.raises(ValueError, match=r"do not fit codebooks"):
        encoder.encode(some_rows(3, hidden_size=8))
    with pytest.raises(ValueError, match=r"rows must be float32"):
        encoder.encode(rows.half())
    with pytest.raises(UnsupportedModelError, match="multiple of 8"):
        RowEncoder.fit(some_rows(300, hidden_size=12), "pq16")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_cannot_be_coded_are_refused(bad: float) -> None:
    rows = some_rows(300)
    encoders = [RowEncoder.fit(rows, row_format) for row_format in ("int8", "pq8")]
    rows[7, 1, 3] = bad
    for encoder in encoders:
        with pytest.raises(ValueError, match="NaN or infinity"):
            encoder.encode(rows)
    with pytest.raises(ValueError, match="NaN or infinity"):
        RowEncoder.fit(rows, "pq8")


def test_without_faiss_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_faiss(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "faiss":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    rows = some_rows(300)
    books = RowEncoder.fit(rows, "pq8").codebooks
    monkeypatch.setattr(builtins, "__import__", without_faiss)
    for call in (
        lambda: RowEncoder.fit(rows, "pq8"),
        lambda: RowEncoder.from_codebooks("pq8", books).encode(rows),
    ):
        with pytest.raises(MissingDependencyError, match=r"pip install 'hmi\[compression\]'"):
            call()
    RowEncoder.fit(rows, "int8").encode(rows)  # needs none
