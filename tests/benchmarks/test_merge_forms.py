"""Other merges begin as the sum, and add up what they say they do."""

import pytest
import torch

from benchmarks import merge_forms
from benchmarks.merges import FORMS, GatedMerge, MatrixMerge, NeighbourMerge, WeightMerge
from benchmarks.result import BenchmarkResult
from hmi_engine.construct.distillation_corpus import Misses
from hmi_engine.construct.distillation_student import Merge
from hmi_engine.construct.distillation_windows import plan_merge
from hmi_engine.models.packing import PackedSequences

SIZE, PLACEHOLDER = 8, 1
TEXTS = ([5, 6, 7, 5, 6], [9], [6, 5])
"""A bigram that comes twice, a text of one token, and neighbours across texts that are none."""


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "position_embeddings": torch.randn(16, SIZE, generator=generator),
        "layer_norm.weight": torch.rand(SIZE, generator=generator) + 0.5,
        "layer_norm.bias": torch.randn(SIZE, generator=generator),
    }


@pytest.fixture
def batch():
    """Plan, rows and positions of TEXTS, and each text's rows to the right, to the left and alone."""
    sequences = PackedSequences.pack([list(text) for text in TEXTS])
    plan = plan_merge(sequences, Misses.none(sequences.num_tokens), 2, PLACEHOLDER)
    rows = torch.randn(
        len(plan.windows) * 2 + len(plan.tokens), SIZE, generator=torch.Generator().manual_seed(1)
    )
    number = {tuple(window): place for place, window in enumerate(plan.windows.tolist())}
    alone = {token: 2 * len(number) + place for place, token in enumerate(plan.tokens.tolist())}
    parts = []
    for text in TEXTS:
        for place, token in enumerate(text):
            has_left, has_right = place > 0, place + 1 < len(text)
            right = rows[number[token, text[place + 1]]] if has_right else torch.zeros(SIZE)
            left = rows[len(number) + number[text[place - 1], token]] if has_left else torch.zeros(SIZE)
            own = (
                (1 - has_left - has_right) * rows[alone[token]]
                if has_left == has_right
                else torch.zeros(SIZE)
            )
            parts.append(torch.stack([right, left, own]))
    return plan, rows, sequences.positions(), torch.stack(parts)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_all_begin_as_the_sum(form, tensors, batch):
    plan, rows, positions, _ = batch
    expected = Merge(tensors)(rows, plan, positions)
    torch.testing.assert_close(form.build(tensors)(rows, plan, positions), expected)


def test_weights_and_matrices_belong_to_a_part(tensors, batch):
    plan, rows, positions, parts = batch
    weight, matrix = WeightMerge(tensors), MatrixMerge(tensors)
    with torch.no_grad():
        weight.weights.normal_()
        matrix.matrices.normal_()
        torch.testing.assert_close(weight.combine(rows, plan, positions), (parts * weight.weights).sum(1))
        expected = sum(parts[:, part] @ matrix.matrices[part] for part in range(3))
        torch.testing.assert_close(matrix.combine(rows, plan, positions), expected)


def test_gates_see_all_rows_of_a_token(tensors, batch):
    plan, rows, positions, parts = batch
    merge = GatedMerge(tensors)
    with torch.no_grad():
        merge.gate.weight.normal_()
        right, left, own = parts.unbind(1)
        to_right, to_left = (2 * torch.sigmoid(merge.gate(torch.cat([right, left, own], 1)))).split(SIZE, 1)
        expected = to_right * right + to_left * left + own
        torch.testing.assert_close(merge.combine(rows, plan, positions), expected)


def test_neighbours_are_those_of_the_same_text(tensors, batch):
    plan, rows, positions, parts = batch
    merge = NeighbourMerge(tensors)
    with torch.no_grad():
        merge.left.weight.normal_()
        merge.right.weight.normal_()
        combined = merge.combine(rows, plan, positions).split([len(text) for text in TEXTS])
        for summed, found in zip(parts.sum(1).split([len(text) for text in TEXTS]), combined, strict=True):
            for place in range(len(summed)):
                expected = summed[place].clone()
                if place:
                    expected += merge.left.weight @ summed[place - 1]
                if place + 1 < len(summed):
                    expected += merge.right.weight @ summed[place + 1]
                torch.testing.assert_close(found[place], expected)


@pytest.mark.slow
def test_the_study_runs(tmp_path):
    merge_forms.main(["--quick", "--out", str(tmp_path / "forms.json")])
    result = BenchmarkResult.model_validate_json((tmp_path / "forms.json").read_text())
    before = {row[2] for row in result.tables[0].rows}
    assert len(before) == 1, "all forms start from the same model"
