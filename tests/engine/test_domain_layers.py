"""A domain's own domain layers: what is refused, and that others are not touched."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import sentences
from safetensors.torch import save_file
from transformers import BertModel

import hmi_engine as hmi
from hmi_engine.construct.domain_tree import TreeChange
from hmi_engine.errors import StoreBusyError, StoreCorruptError, UnsupportedModelError


@pytest.fixture
def store(tiny_bert: Path, tmp_path: Path) -> hmi.Store:
    store = hmi.Store.create(tmp_path / "store", general=tiny_bert, plot_layers=2)
    store.add_domain("one", sentences(20, seed=1), min_count=1)
    store.add_domain("below", sentences(20, seed=2), parent="one", min_count=1)
    store.add_domain("beside", sentences(20, seed=3), min_count=1)
    return store


@pytest.fixture
def weights(tiny_bert: Path) -> dict[str, torch.Tensor]:
    model = BertModel.from_pretrained(tiny_bert)
    return {name: tensor + 0.01 for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def test_exactly_the_rows_of_the_old_layers_are_computed_anew(
    store: hmi.Store, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    before = {name: info.generation for name, info in store.domains.items()}
    save_file(weights, tmp_path / "layers.safetensors")
    store.set_domain_layers("one", tmp_path / "layers.safetensors")
    after = store.domains
    changed = {name for name in before if after[name].generation != before[name]}
    assert changed == {"one", "below"}
    assert after["one"].layer_identity == after["below"].layer_identity != after["beside"].layer_identity
    assert after["one"].unigrams and not after["below"].unigrams
    assert store.verify() == []
    store.set_domain_layers("one", None)
    assert store.domains["one"].layer_identity == store.general.domain_layers
    assert not store.domains["one"].unigrams and store.verify() == []


def test_what_does_not_fit_is_refused_and_leaves_nothing(
    store: hmi.Store, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    name = "encoder.layer.1.output.dense.bias"
    for broken in (
        {key: tensor for key, tensor in weights.items() if key != name},
        weights | {name: weights[name][:-1]},
        weights | {name: weights[name] * torch.nan},
    ):
        with pytest.raises(UnsupportedModelError, match=name):
            store.set_domain_layers("one", broken)
    with pytest.raises(UnsupportedModelError, match="is the root"):
        store.set_domain_layers("general", weights)
    (tmp_path / "file").write_bytes(b"no safetensors")
    with pytest.raises(UnsupportedModelError, match="no safetensors file"):
        store.set_domain_layers("one", tmp_path / "file")
    assert store.domains["one"].layers is None and store.verify() == []


def test_without_domain_layers_there_is_nothing_to_replace(
    tiny_bert: Path, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    with hmi.Store.create(tmp_path / "plain", general=tiny_bert, plot_layers=0) as store:
        store.add_domain("one", sentences(5, seed=1))
        with pytest.raises(UnsupportedModelError, match="plot_layers is 0"):
            store.set_domain_layers("one", weights)


@pytest.fixture
def replace_layers(store: hmi.Store, weights: dict[str, torch.Tensor]) -> Callable[[], str]:
    """Gives ``one`` other layers each time; returns their identity."""
    numbers = itertools.count()

    def replace() -> str:
        number = next(numbers)
        store.set_domain_layers("one", {name: tensor + number / 100 for name, tensor in weights.items()})
        return store.domains["one"].layer_identity

    return replace


def test_layers_that_no_domain_has_any_more_are_forgotten(
    store: hmi.Store, replace_layers: Callable[[], str]
) -> None:
    library = store.domain_layers
    identities = [replace_layers()]
    first = library(identities[0])
    identities += [replace_layers(), replace_layers()]
    assert library(identities[0]) is first, "a batch that began before may still ask for them"
    identities += [replace_layers() for _ in range(3)]
    assert set(library._loaded) == set(identities[-3:])
    with pytest.raises(StoreCorruptError, match=identities[0]):
        library(identities[0])


def test_layers_of_a_change_that_failed_are_forgotten(
    store: hmi.Store, replace_layers: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(change: TreeChange, **_: object) -> None:
        raise StoreBusyError("on purpose")

    identity = replace_layers()
    with monkeypatch.context() as patched:
        patched.setattr(TreeChange, "commit", fail)
        for _ in range(3):
            with pytest.raises(StoreBusyError):
                replace_layers()
    last = [replace_layers(), replace_layers()]
    assert set(store.domain_layers._loaded) == {identity, *last}


def test_layers_of_a_change_under_way_stay_whoever_loads_others(
    store: hmi.Store, replace_layers: Callable[[], str], weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    library, file = store.domain_layers, tmp_path / "layers.safetensors"
    save_file(weights, file)
    library.add("under way", file)
    added = library("under way")
    for _ in range(3):
        replace_layers()
    assert library("under way") is added


@pytest.mark.parametrize("miss", ["backoff", "exact", "budget"])
def test_damaged_layers_fail_whom_they_are_computed_for(
    store: hmi.Store, weights: dict[str, torch.Tensor], make_head: Callable[..., hmi.ClassificationHead], miss
) -> None:
    store.set_domain_layers("one", weights)
    for domain in ("below", "beside"):
        store.add_tenant(domain, domain=domain, adapter=hmi.Adapter({}), head=make_head(store.general))
    file = store.layout.resolve(store.domains["one"].layers.file)
    file.write_bytes(file.read_bytes()[:-8])
    requests = [hmi.Request(domain, "the cell the cell divides") for domain in ("below", "beside")]
    # As another process finds them: this one has loaded the layers already.
    with hmi.Store.open(store.layout.root) as opened, hmi.Engine(opened, miss=miss) as engine:
        below, beside = engine.run(requests)
    assert beside.error is None
    if miss == "backoff":
        assert below.error is None
    else:
        assert isinstance(below.error, StoreCorruptError) and str(file) in str(below.error)
