from pathlib import Path

import pytest

from hmi_engine.errors import StoreCorruptError, UnsupportedModelError
from hmi_engine.knowledge.general import MAX_VOCAB_SIZE, GeneralInfo
from hmi_engine.knowledge.layout import StoreLayout


def test_paths_are_made_of_numbers_only() -> None:
    layout = StoreLayout(Path("/store"))
    assert layout.resolve(layout.plot_file(7, 12)) == Path("/store/domains/7/12.plot.safetensors")
    assert layout.resolve(layout.tenant_file(0x1AB, 500)) == Path("/store/tenants/ab/427.500.safetensors")
    with pytest.raises(ValueError):
        layout.tenant_file("../../etc", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "file",
    ["/etc/passwd", "../x", "tenants/../../x", "general/config.json", "", "tenantsx/a", "catalog.sqlite"],
)
def test_a_catalog_path_outside_the_store_is_refused(file: str) -> None:
    with pytest.raises(StoreCorruptError, match="outside"):
        StoreLayout(Path("/store")).resolve(file)


def test_upper_layers(general: GeneralInfo) -> None:
    assert list(general.upper_layers) == [2, 3]
    assert general.num_upper_layers == 2
    general.check_supported()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": MAX_VOCAB_SIZE + 1}, "21 bits"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"plot_layers": 4}, "plot_layers is 4"),
        ({"plot_layers": -1}, "plot_layers is -1"),
        ({"num_heads": 3}, "no multiple"),
        ({"hidden_size": 0}, "hidden_size"),
    ],
)
def test_impossible_sizes_are_refused(general: GeneralInfo, change: dict[str, int], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        general.model_copy(update=change).check_supported()


def test_the_largest_vocabulary_is_supported(general: GeneralInfo) -> None:
    general.model_copy(update={"vocab_size": MAX_VOCAB_SIZE}).check_supported()
