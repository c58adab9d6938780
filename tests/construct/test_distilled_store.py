"""Distillation in a store: what replaces what, what a crash leaves, what is refused; export and import."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from reference_hbert import backed_off, upper_layers
from safetensors.torch import load_file, save_file
from transformers import BertModel

import hmi_engine as hmi
from hmi_engine import distilling_store
from hmi_engine.construct import general_change
from hmi_engine.construct.distillation_settings import DistillationSettings, StageSettings
from hmi_engine.construct.distilled_model import (
    DistilledModel,
    read_distillation,
    weights_sha256,
    write_folder,
)
from hmi_engine.errors import (
    GeneralChangedError,
    GeneralInUseError,
    ReadOnlyStoreError,
    StoreBusyError,
    StoreError,
    StoreExistsError,
    UnknownTenantError,
    UnsupportedModelError,
)
from hmi_engine.knowledge.catalog import ROOT_DOMAIN
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.models.packing import PackedSequences

STEPS = 3


def settings(**changes) -> DistillationSettings:
    values = {
        "stage_1": StageSettings(
            steps=STEPS, trainable=("domain", "merge"), merged_weight=1.0, learning_rate=5e-3
        ),
        "stage_2": StageSettings(
            steps=STEPS, trainable=("merge", "upper"), upper_weight=1.0, learning_rate=5e-3
        ),
        "batch_tokens": 128,
        "max_tokens": 16,
        "held_out_fraction": 0.1,
    }
    return DistillationSettings(**(values | changes))


@pytest.fixture(scope="module")
def distilled(tiny_bert: Path, tmp_path_factory, corpus: list[str]):
    """A store with a distilled base and one domain below another, its export and its compact form."""
    folder = tmp_path_factory.mktemp("distilled")
    with hmi.Store.create(folder / "store", general=tiny_bert, plot_layers=2, row_dtype="float32") as store:
        store.add_domain("words", corpus[:200])
        store.add_domain("fewer", corpus[200:], parent="words")
        before = {name: store.domains[name] for name in store.domains}
        report = store.distill(
            corpus, settings=settings(), export=folder / "export", compact=folder / "compact.safetensors"
        )
        yield store, report, folder, before


def merged_by_store(store: hmi.Store, domain: str, ids: list[int]) -> torch.Tensor:
    sequences = PackedSequences.pack([ids])
    library = PlotLibrary(store.layout, store.catalog, store.general, domain_layers=store.domain_layers)
    with library.reading([domain]) as plots:
        return plots.merge(store.model, sequences, [domain], plots.lookup(sequences, [domain]))


def reference_of(folder: Path) -> BertModel:
    """transformers' own model of a folder, with the merge's LayerNorm and positions beside it."""
    return BertModel.from_pretrained(folder).eval()


@torch.no_grad()
def test_every_domain_serves_rows_of_the_new_layers(distilled, held_out) -> None:
    """Against transformers run window by window on the new weights, misses composed, with the new merge."""
    store, _, _, before = distilled
    model = reference_of(store.general_folder)
    merge = load_file(store.general_folder / "merge.safetensors")
    for domain in ("words", "fewer"):
        assert store.domains[domain].layer_identity == store.general.domain_layers
        assert store.domains[domain].layer_identity != before[domain].layer_identity
        assert store.domains[domain].rows == before[domain].rows > 0
    ids = store.encoder.token_ids(held_out[:1])[0]
    library = PlotLibrary(store.layout, store.catalog, store.general, domain_layers=store.domain_layers)
    with library.reading(["words"]) as plots:

        def has(pair: list[int]) -> bool:
            return bool(plots.lookup(PackedSequences.pack([pair]), ["words"])[0, 0] >= 0)

        expected = backed_off(model, ids, 2, 2, has, merge)
    found = merged_by_store(store, "words", ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    final = store.model.run_layers(found.clone(), PackedSequences.pack([ids]), first=2)
    torch.testing.assert_close(final, upper_layers(model, expected, 2), atol=1e-5, rtol=1e-5)


def test_the_store_is_sound_and_has_one_base(distilled) -> None:
    store, _, _, _ = distilled
    assert store.verify() == []
    assert [path.name for path in store.layout.general_folders()] == [store.general.folder]
    assert store.general.folder != "general"


def test_what_distillation_must_not_change_stays(distilled, tiny_bert: Path) -> None:
    store, _, _, _ = distilled
    ours, theirs = load_file(store.general_folder / "model.safetensors"), BertModel.from_pretrained(tiny_bert)
    for name, tensor in theirs.state_dict().items():
        if not name.startswith("encoder.layer."):
            assert torch.equal(ours[name], tensor), name
        elif name.endswith("weight"):
            assert not torch.equal(ours[name], tensor), name


def test_an_export_makes_the_same_store(distilled, tmp_path, held_out) -> None:
    """``plot_layers`` and ``window`` are taken from the export."""
    store, _, folder, _ = distilled
    ids = store.encoder.token_ids(held_out[:1])[0]
    with hmi.Store.create(tmp_path / "again", general=folder / "export", row_dtype="float32") as again:
        assert (again.general.plot_layers, again.general.window) == (2, 2)
        assert torch.equal(merged_by_store(again, ROOT_DOMAIN, ids), merged_by_store(store, ROOT_DOMAIN, ids))


def test_the_compact_form_is_the_export_but_for_a_rounding(distilled, tiny_bert, tmp_path) -> None:
    """Each weight within half a step of its row's int8 scale, as the format says; vectors exactly."""
    _, report, folder, _ = distilled
    with hmi.Store.create(
        tmp_path / "compact", general=tiny_bert, distilled=folder / "compact.safetensors"
    ) as made:
        ours = load_file(made.general_folder / "model.safetensors")
        merge = load_file(made.general_folder / "merge.safetensors")
    base = load_file(tiny_bert / "model.safetensors")
    theirs = load_file(folder / "export" / "model.safetensors")
    assert weights_sha256(base) == report.teacher_sha256
    for name, tensor in theirs.items():
        change = (tensor - base[name]).abs()
        step = change.amax(-1, keepdim=True) / 127 if tensor.dim() == 2 else torch.zeros(())
        assert bool(((ours[name] - tensor).abs() <= step / 2 + 1e-6).all()), name
    exact = load_file(folder / "export" / "merge.safetensors")
    torch.testing.assert_close(merge, exact, atol=1e-3, rtol=1e-3)
    size = (folder / "compact.safetensors").stat().st_size
    assert size < (folder / "export" / "model.safetensors").stat().st_size / 2


@pytest.mark.parametrize("options", [{"plot_layers": 1}, {"plot_layers": 0}, {"window": 3}])
def test_an_export_serves_only_what_it_was_made_for(distilled, tmp_path, options) -> None:
    _, _, folder, _ = distilled
    with pytest.raises(UnsupportedModelError, match="distilled for plot_layers=2 and window=2"):
        hmi.Store.create(tmp_path / "other", general=folder / "export", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_distilled_folder_and_its_name_are_on_the_disk(distilled, tmp_path, monkeypatch) -> None:
    base = Path(shutil.copytree(distilled[2] / "export", tmp_path / "base"))
    (base / "vocabulary").mkdir()
    (base / "vocabulary" / "words.txt").write_text("a")
    report, merge = read_distillation(base)
    flushed, fsync = set(), os.fsync

    def note_fsync(descriptor: int) -> None:
        flushed.add(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note_fsync)
    target = tmp_path / "new" / "general.7"
    write_folder(target, base, DistilledModel({}, merge, report))
    assert {tmp_path, target.parent, target, target / "vocabulary"} <= flushed


def test_two_models_are_not_written_into_one_folder(distilled, tmp_path, monkeypatch) -> None:
    base = distilled[2] / "export"
    report, merge = read_distillation(base)
    model, target = DistilledModel({}, merge, report), tmp_path / "new"
    target.mkdir()
    copyfile = shutil.copyfile

    def write_another_first(*arguments: Path) -> None:
        monkeypatch.setattr(shutil, "copyfile", copyfile)
        with pytest.raises(StoreBusyError, match="new: another model is being written there"):
            write_folder(target, base, model)
        copyfile(*arguments)

    monkeypatch.setattr(shutil, "copyfile", write_another_first)
    write_folder(target, base, model)
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in target.iterdir()} == names
    with pytest.raises(StoreExistsError, match="is there already"):
        write_folder(target, base, model)
    assert {path.name for path in target.iterdir()} == names


def damage_report(export: Path) -> None:
    (export / "distillation.json").write_text("{")


def lose_merge(export: Path) -> None:
    (export / "merge.safetensors").unlink()


def shrink_merge(export: Path) -> None:
    merge = load_file(export / "merge.safetensors")
    save_file(merge | {"layer_norm.bias": torch.zeros(3)}, export / "merge.safetensors")


@pytest.mark.parametrize("damage", [damage_report, lose_merge, shrink_merge])
def test_a_damaged_export_is_refused(distilled, tmp_path, damage) -> None:
    _, _, folder, _ = distilled
    shutil.copytree(folder / "export", tmp_path / "export")
    damage(tmp_path / "export")
    with pytest.raises(UnsupportedModelError, match=r"distilled model|merge"):
        hmi.Store.create(tmp_path / "store", general=tmp_path / "export")
    assert not (tmp_path / "store").exists()


def test_a_compact_form_of_another_base_or_of_no_kind_is_refused(distilled, tiny_bert, tmp_path) -> None:
    _, _, folder, _ = distilled
    compact = folder / "compact.safetensors"
    other = tmp_path / "other"
    shutil.copytree(tiny_bert, other)
    weights = load_file(other / "model.safetensors")
    weights["embeddings.LayerNorm.bias"] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    (tmp_path / "cut.safetensors").write_bytes(compact.read_bytes()[:-100])
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    for general, file, message in [
        (other, compact, "another base model"),
        (tiny_bert, tmp_path / "cut.safetensors", "no readable compact"),
        (tiny_bert, tmp_path / "foreign.safetensors", "no compact distilled model"),
        (tiny_bert, tmp_path / "missing.safetensors", "no readable compact"),
        (folder / "export", compact, "distilled already"),
    ]:
        with pytest.raises(UnsupportedModelError, match=message):
            hmi.Store.create(tmp_path / "store", general=general, distilled=file)
        assert not (tmp_path / "store").exists()


def test_tenants_forbid_another_base(store, corpus, make_head) -> None:
    adapter = hmi.Adapter({})
    store.add_tenant("acme/a", domain="words", adapter=adapter, head=make_head(store.general))
    with pytest.raises(GeneralInUseError, match=r"1 tenants.*acme/a"):
        store.distill(corpus, settings=settings())
    assert store.general.folder == "general"
    assert store.verify() == []


def test_a_domain_gets_layers_of_its_own(store, corpus, make_head) -> None:
    """The base, its merge and its tenants stay; those below the domain inherit its layers."""
    store.add_domain("below", corpus[:50], parent="words")
    store.add_tenant("acme/a", domain="words", adapter=hmi.Adapter({}), head=make_head(store.general))
    general = store.general
    report = store.distill(corpus, domain="words", settings=settings())
    assert store.general == general
    assert report.settings.stage_2.steps == 0
    assert report.stages[0].losses
    assert store.domains["words"].layers is not None
    assert store.domains["below"].layer_identity == store.domains["words"].layer_identity
    assert store.domains["words"].layer_identity != general.domain_layers
    assert store.verify() == []
    layers = load_file(store.layout.resolve(store.domains["words"].layers.file))
    assert {name.split(".")[2] for name in layers} == {"0", "1"}


def test_a_store_opened_before_refuses_to_mix_bases(tiny_bert, tmp_path, corpus, make_head) -> None:
    with hmi.Store.create(tmp_path / "store", general=tiny_bert, plot_layers=2) as store:
        store.add_domain("words", corpus)
        with hmi.Store.open(tmp_path / "store") as other, hmi.Engine(other) as engine:
            head = make_head(other.general)
            (unknown,) = engine.run([hmi.Request("acme/a", text="the cell")])  # the tokenizer is loaded
            assert isinstance(unknown.error, UnknownTenantError)
            store.distill(corpus, settings=settings())
            with pytest.raises(GeneralChangedError, match="open the store"):
                other.add_tenant("acme/a", domain="words", adapter=hmi.Adapter({}), head=head)
            store.add_tenant("acme/a", domain="words", adapter=hmi.Adapter({}), head=head)
            (response,) = engine.run([hmi.Request("acme/a", text="the cell")])
            assert isinstance(response.error, GeneralChangedError)
        with hmi.Engine(store) as engine:
            (response,) = engine.run([hmi.Request("acme/a", text="the cell")])
            assert response.error is None


class Crash(BaseException):
    """The process is gone: nothing is cleaned up after it."""


def test_a_failure_before_the_commit_leaves_the_old_store(store, corpus, monkeypatch) -> None:
    before = {name: store.domains[name] for name in store.domains}

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(general_change.TreeChange, "commit", fail)
    with pytest.raises(OSError, match="No space"):
        store.distill(corpus, settings=settings())
    assert store.general.folder == "general"
    assert {name: store.domains[name] for name in store.domains} == before
    assert [path.name for path in store.layout.general_folders()] == ["general"]


def test_verify_finds_and_repairs_what_a_crash_left(store, corpus, monkeypatch) -> None:
    """The new folder was written, the catalog not: its files are orphans."""
    monkeypatch.setattr(general_change.shutil, "rmtree", lambda *arguments, **options: None)

    def crash(*arguments, **options):
        raise Crash

    monkeypatch.setattr(general_change, "TreeChange", crash)
    with pytest.raises(Crash):
        store.distill(corpus, settings=settings())
    monkeypatch.undo()
    problems = store.verify()
    assert {problem.kind for problem in problems} == {"orphan"}
    assert any(problem.path.name == "model.safetensors" for problem in problems)
    store.repair(problems)
    assert store.verify() == []
    assert [path.name for path in store.layout.general_folders()] == ["general"]


def test_a_distilled_base_is_distilled_further_from_its_teacher(
    distilled, tmp_path, tiny_bert, corpus
) -> None:
    _, report, folder, _ = distilled
    with hmi.Store.create(tmp_path / "more", general=folder / "export") as more:
        with pytest.raises(
            UnsupportedModelError, match="not the model that the store's base was distilled from"
        ):
            more.distill(corpus, settings=settings())  # its source is the export, not the teacher
        again = more.distill(corpus, settings=settings(), teacher=tiny_bert)
        assert again.teacher_sha256 == report.teacher_sha256
        first, second = report.stages[-1].held_out[-1], again.stages[0].held_out[0]
        assert second.exact == pytest.approx(first.exact, rel=1e-4)  # it goes on from where the first ended


def test_where_results_cannot_go_is_said_before_anything_is_learned(store, corpus, tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(StoreExistsError, match="full is there already"):
        store.distill(corpus, settings=settings(), export=tmp_path / "full", progress=unexpected)
    with pytest.raises(UnsupportedModelError, match="are for a base model"):
        store.distill(corpus, domain="words", compact=tmp_path / "file", progress=unexpected)
    a_file = tmp_path / "full" / "x"
    for targets, message in [
        ({"compact": tmp_path / "full"}, "full is a folder; name a file"),
        ({"compact": a_file / "below" / "file"}, "cannot write .*Not a directory"),
        ({"export": a_file / "below"}, "cannot write .*Not a directory"),
        ({"compact": tmp_path / "new", "export": tmp_path / "new" / "export"}, "new has to be a folder"),
        ({"compact": tmp_path / "new", "folder": tmp_path / "new"}, "new has to be a folder"),
    ]:
        with pytest.raises(StoreError, match=message):
            store.distill(corpus, settings=settings(), progress=unexpected, **targets)
    assert [path.name for path in tmp_path.rglob("*") if path.name in ("file", "new", "below")] == []


def test_a_teacher_with_other_embeddings_has_no_compact_form(store, corpus, tiny_bert, tmp_path) -> None:
    """That form is put on the teacher, of which the distilled model has the encoder alone. The pooler does
    not count."""

    def changed(name: str) -> Path:
        folder = Path(shutil.copytree(tiny_bert, tmp_path / name.partition(".")[0]))
        weights = load_file(folder / "model.safetensors")
        weights[name] = weights[name] + 1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    compact = tmp_path / "compact.safetensors"
    with pytest.raises(UnsupportedModelError, match=r"embeddings.LayerNorm.bias .* take --export"):
        store.distill(
            corpus,
            settings=settings(),
            teacher=changed("embeddings.LayerNorm.bias"),
            compact=compact,
            progress=unexpected,
        )
    assert not compact.exists()
    teacher = changed("pooler.dense.bias")
    store.distill(corpus, settings=settings(), teacher=teacher, compact=compact)
    with hmi.Store.create(tmp_path / "other", general=teacher, distilled=compact) as other:
        ours, theirs = (load_file(s.general_folder / "model.safetensors") for s in (store, other))
    for name in ours:
        if not name.startswith("pooler."):
            torch.testing.assert_close(theirs[name], ours[name], atol=1e-2, rtol=0)


def unexpected(*arguments, **options):
    raise AssertionError("work has begun")


def test_a_store_that_cannot_change_leaves_no_export_and_the_same_call_goes_on(
    store, corpus, tmp_path, monkeypatch
) -> None:
    """Someone else changes the tree meanwhile, the first time."""
    targets = {"export": tmp_path / "export", "compact": tmp_path / "compact.safetensors"}

    def busy(*arguments, **options):
        raise StoreBusyError("someone else changed the tree")

    with monkeypatch.context() as patch, pytest.raises(StoreBusyError):
        patch.setattr(distilling_store, "replace_general", busy)
        store.distill(corpus, settings=settings(), folder=tmp_path / "work", **targets)
    assert not targets["export"].exists()
    assert store.general.folder == "general"
    report = store.distill(corpus, settings=settings(), folder=tmp_path / "work", **targets)
    assert json.loads((targets["export"] / "distillation.json").read_text()) == report.model_dump(mode="json")
    assert store.general.folder != "general"


def test_a_domain_without_steps_of_stage_1_is_refused(store, corpus) -> None:
    nothing = StageSettings(steps=0, trainable=("domain", "merge"), merged_weight=1.0)
    with pytest.raises(UnsupportedModelError, match="--steps-1"):
        store.distill(corpus, domain="words", settings=settings(stage_1=nothing), progress=unexpected)


def test_no_domain_layers_no_distillation(tiny_bert, tmp_path, corpus) -> None:
    with (
        hmi.Store.create(tmp_path / "plain", general=tiny_bert, plot_layers=0) as plain,
        pytest.raises(UnsupportedModelError, match="no domain layers"),
    ):
        plain.distill(corpus, settings=settings())


def test_the_root_and_a_read_only_store_are_refused(store, corpus) -> None:
    with pytest.raises(UnsupportedModelError, match="is the root"):
        store.distill(corpus, domain=ROOT_DOMAIN, settings=settings())
    with (
        hmi.Store.open(store.layout.root, read_only=True) as reader,
        pytest.raises(ReadOnlyStoreError),
    ):
        reader.distill(corpus, settings=settings())


def test_a_new_catalog_can_be_read_by_versions_that_know_one_folder(store) -> None:
    rows = store.catalog._database.query("SELECT info FROM general")
    assert "folder" not in json.loads(rows[0]["info"])
