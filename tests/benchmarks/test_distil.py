"""The recipe distils the text that it says, into a folder that the accuracy study and stores take."""

import pytest

import benchmarks.distil as distil
from benchmarks.accuracy_study.methods import Hierarchical
from benchmarks.accuracy_study.plan import Plan
from benchmarks.accuracy_study.sets import ClassificationSet
from hmi_engine.knowledge.examples import Example
from hmi_engine.store import Store


def labelled(name, train, dev=("d",), test=("t",)):
    return ClassificationSet(
        name, *(tuple(Example(text, "x") for text in split) for split in (train, dev, test))
    )


def test_text_that_any_set_holds_out_is_left_out():
    sets = [labelled("one", ("a", "b", "a", "t2")), labelled("two", ("c", "b", "d"), test=("t2",))]
    assert distil.unlabelled_texts(sets) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("variant", "steps", "misses"),
    [
        ("distilled", (5, 7), "cross_fitted"),
        ("distilled-domain", (5, 0), "cross_fitted"),
        ("distilled-upper", (0, 7), "cross_fitted"),
        ("distilled-complete", (5, 7), "none"),
    ],
)
def test_a_variant_leaves_one_thing_out(variant, steps, misses):
    settings = distil.settings_of(variant, (5, 7), "no", seed=3)
    assert tuple(stage.steps for stage in settings.stages) == steps
    assert settings.misses == misses
    assert settings.seed == 3


def test_the_folder_is_one_that_stores_and_the_study_take(tmp_path, tiny_bert, make_sentences, monkeypatch):
    monkeypatch.setattr(distil, "packaged_model", lambda: tiny_bert)
    sets = [labelled("one", make_sentences(200, seed=1, longest=12))]
    monkeypatch.setattr(distil, "read_sets", lambda _: sets)
    arguments = [str(tmp_path / "bases"), "--data", str(tmp_path), "--plot-layers", "2", "--quick"]
    distil.main(arguments)
    method = Hierarchical(2, "distilled")
    folder = Plan(sets, (method,), (0,), tmp_path / "bases").base_folder(method)
    with Store.create(tmp_path / "folder", general=folder, plot_layers=2) as store:
        assert store.general.plot_layers == 2
    compact = folder.with_suffix(".safetensors")
    with Store.create(tmp_path / "compact", general=tiny_bert, plot_layers=2, distilled=compact) as store:
        assert store.general.plot_layers == 2
