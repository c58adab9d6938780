"""The hierarchical form that HMI brings along is that of the packaged base model, and small."""

from hmi_engine.construct.distilled_model import apply_compact
from hmi_engine.demo.base_model import DISTILLATION
from hmi_engine.models.bert_loading import import_bert

MOST_BYTES = 15_000_000


def test_it_belongs_to_the_packaged_model(minilm, tmp_path):
    import_bert(str(minilm), tmp_path)
    model = apply_compact(DISTILLATION, tmp_path)  # raises where the digests differ
    assert (model.report.plot_layers, model.report.window) == (3, 2)
    for stage in model.report.stages:
        before, *_, after = stage.held_out
        assert after.backoff[-1] < before.backoff[-1]


def test_it_is_small():
    assert DISTILLATION.stat().st_size < MOST_BYTES
