"""The hierarchical forms that HMI brings along are those of the packaged base model, and small."""

import pytest

from hmi_engine.construct.distilled_model import apply_compact
from hmi_engine.demo.base_model import PACKAGED_PLOT_LAYERS, packaged_distillation
from hmi_engine.errors import UnsupportedModelError
from hmi_engine.models.bert_loading import import_bert

MOST_BYTES = 15_000_000


@pytest.mark.parametrize("plot_layers", PACKAGED_PLOT_LAYERS)
def test_it_belongs_to_the_packaged_model(plot_layers, minilm, tmp_path):
    import_bert(str(minilm), tmp_path)
    model = apply_compact(packaged_distillation(plot_layers), tmp_path)  # raises where the digests differ
    assert (model.report.plot_layers, model.report.window) == (plot_layers, 2)
    for stage in model.report.stages:
        before, *_, after = stage.held_out
        assert after.backoff[-1] < before.backoff[-1]


@pytest.mark.parametrize("plot_layers", PACKAGED_PLOT_LAYERS)
def test_it_is_small(plot_layers):
    assert packaged_distillation(plot_layers).stat().st_size < MOST_BYTES


def test_of_other_depths_there_is_none():
    with pytest.raises(UnsupportedModelError, match="hmi distill"):
        packaged_distillation(5)
