from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hmi_engine.errors import InvalidAdapterError
from hmi_engine.knowledge.adapters import (
    BOTTLENECK_SITES,
    KINDS,
    LORA_SITES,
    MAX_RANK,
    Adapter,
    BiasBlock,
    Block,
    BottleneckBlock,
    LoraBlock,
    ScaleBlock,
    Site,
    random_adapter,
)
from hmi_engine.knowledge.general import GeneralInfo


def lora(inputs: int = 8, outputs: int = 8, rank: int = 2, scale: float = 1.0) -> LoraBlock:
    return LoraBlock(torch.ones(inputs, rank), torch.ones(rank, outputs), scale)


def bottleneck(rank: int = 2) -> BottleneckBlock:
    return BottleneckBlock(torch.ones(8, rank), torch.ones(rank), torch.ones(rank, 8), torch.ones(8), "relu")


def test_every_site_takes_the_shapes_of_the_base(general: GeneralInfo) -> None:
    sizes = {Site.FFN_UP: (8, 12), Site.FFN_DOWN: (12, 8)}
    Adapter({(2, site): lora(*sizes.get(site, (8, 8))) for site in LORA_SITES}).validate(general)
    Adapter({(3, site): bottleneck() for site in BOTTLENECK_SITES}).validate(general)
    Adapter({}).validate(general)
    wide = {Site.FFN_UP_SCALE, Site.FFN_UP_BIAS, Site.FFN_DOWN_INPUT_SCALE}
    for make_block, kind in ((ScaleBlock, KINDS["ia3"]), (BiasBlock, KINDS["bitfit"])):
        blocks = {(2, site): make_block(torch.ones(12 if site in wide else 8)) for site in kind.sites}
        Adapter(blocks).validate(general)


def test_properties(mixed_adapter: Adapter) -> None:
    assert mixed_adapter.kind == "mixed"
    assert mixed_adapter.rank == 5
    assert mixed_adapter.layers == (2, 3)
    assert (
        mixed_adapter.num_parameters
        == (24 + 24) + (12 + 8) + (16 + 24) + (32 + 4 + 32 + 8) + (40 + 5 + 40 + 8) + 12 + 8
    )
    assert [key for key, _ in mixed_adapter.ordered_blocks()] == [
        (2, Site.AFTER_FFN),
        (2, Site.AFTER_FFN_NORMALIZED),
        (2, Site.FFN_DOWN_INPUT_SCALE),
        (2, Site.FFN_UP),
        (3, Site.FFN_DOWN),
        (3, Site.QUERY_BIAS),
        (3, Site.VALUE),
    ]
    assert (Adapter({}).kind, Adapter({}).rank, Adapter({}).layers) == ("none", 0, ())
    assert Adapter({(2, Site.QUERY): lora()}).kind == "lora"
    assert Adapter({(2, Site.AFTER_FFN): bottleneck()}).kind == "bottleneck"


WITH_NAN = torch.ones(8, 2).index_fill(0, torch.tensor([3]), float("nan"))
WITH_INFINITY = torch.ones(2, 8).index_fill(1, torch.tensor([0]), float("inf"))


@pytest.mark.parametrize(
    ("layer", "site", "make_block", "message"),
    [
        (1, Site.QUERY, lora, r"layer 1, below plot_layers=2.*lower_layers='drop'.*smaller plot_layers"),
        (4, Site.QUERY, lora, r"layer 4, but tiny-bert has layers 0 to 3"),
        (-1, Site.QUERY, lora, r"layer -1"),
        (True, Site.QUERY, lora, r"a layer is an int"),
        ("2", Site.QUERY, lora, r"a layer is an int"),
        (2, "nowhere", lora, r"unknown site; known are query, key"),
        (2, Site.QUERY, bottleneck, r"layer 2, query: expected a LoraBlock, found a BottleneckBlock"),
        (2, Site.AFTER_FFN, lora, r"expected a BottleneckBlock, found a LoraBlock"),
        (2, Site.QUERY, dict, r"expected a LoraBlock, found a dict"),
        (2, Site.QUERY, lambda: lora(9, 8), r"layer 2, query, a: shape is \[9, 2\], expected \[8, 2\]"),
        (2, Site.FFN_DOWN, lora, r"ffn_down, a: shape is \[8, 2\], expected \[12, 2\]"),
        (2, Site.QUERY, lambda: LoraBlock(torch.ones(8, 2), torch.ones(3, 8), 1.0), r"b: shape is \[3, 8\]"),
        (2, Site.QUERY, lambda: LoraBlock(torch.ones(16), torch.ones(2, 8), 1.0), r"a: shape is \[16\]"),
        (2, Site.QUERY, lambda: LoraBlock(torch.tensor(1.0), torch.ones(2, 8), 1.0), r"rank is 0"),
        (2, Site.QUERY, lambda: lora(rank=0), r"rank is 0, must be 1 to"),
        (2, Site.QUERY, lambda: lora(rank=MAX_RANK + 1), r"rank is 1025"),
        (2, Site.QUERY, lambda: lora(scale=float("nan")), r"scale is nan"),
        (2, Site.QUERY, lambda: lora(scale="1"), r"scale is '1'"),
        (2, Site.QUERY, lambda: lora(scale=1e39), r"scale is 1e\+39, must be a finite number in float32"),
        (2, Site.QUERY, lambda: lora(scale=-(10**400)), r"scale is -10+"),
        (2, Site.QUERY, lambda: LoraBlock(WITH_NAN, torch.ones(2, 8), 1.0), r"query, a: holds NaN or inf"),
        (2, Site.QUERY, lambda: LoraBlock(torch.ones(8, 2), WITH_INFINITY, 1.0), r"query, b: holds NaN"),
        (
            2,
            Site.QUERY,
            lambda: LoraBlock(torch.ones(8, 2).double(), torch.ones(2, 8), 1.0),
            r"torch.float64",
        ),
        (2, Site.QUERY, lambda: LoraBlock(torch.ones(8, 2).long(), torch.ones(2, 8), 1.0), r"torch.int64"),
        (
            2,
            Site.QUERY,
            lambda: LoraBlock([[1.0]], torch.ones(2, 8), 1.0),
            r"expected a tensor, found a list",
        ),
        (
            2,
            Site.AFTER_FFN,
            lambda: replace(bottleneck(), activation="mish"),
            r"activation 'mish' is unknown",
        ),
        (2, Site.AFTER_FFN, lambda: replace(bottleneck(), up_bias=torch.ones(2)), r"up_bias: shape is \[2\]"),
        (2, Site.KEY_SCALE, lora, r"key.scale: expected a ScaleBlock, found a LoraBlock"),
        (2, Site.KEY_BIAS, lambda: ScaleBlock(torch.ones(8)), r"expected a BiasBlock, found a ScaleBlock"),
        (2, Site.FFN_UP_SCALE, lambda: ScaleBlock(torch.ones(8)), r"vector: shape is \[8\], expected \[12\]"),
        (2, Site.FFN_UP_INPUT_SCALE, lambda: ScaleBlock(torch.ones(12)), r"shape is \[12\], expected \[8\]"),
        (2, Site.FFN_NORM_BIAS, lambda: BiasBlock(torch.ones(1, 8)), r"shape is \[1, 8\], expected \[8\]"),
        (2, Site.KEY_BIAS, lambda: BiasBlock(torch.ones(8) / 0), r"vector: holds NaN or infinity"),
    ],
)
def test_what_does_not_fit_is_refused_and_named(
    general: GeneralInfo, layer: int, site: Site, make_block: Callable[[], Block], message: str
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        Adapter({(layer, site): make_block()}).validate(general)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_short_floats_are_accepted(general: GeneralInfo, dtype: torch.dtype) -> None:
    Adapter({(2, Site.QUERY): LoraBlock(torch.ones(8, 2, dtype=dtype), torch.ones(2, 8), 1)}).validate(
        general
    )


def test_random_adapters_repeat_by_seed(general: GeneralInfo) -> None:
    one, same, other = (random_adapter(general, "bottleneck", 4, seed) for seed in (7, 7, 8))
    assert set(one.blocks) == {(2, Site.AFTER_FFN_NORMALIZED), (3, Site.AFTER_FFN_NORMALIZED)}
    for key, block in one.blocks.items():
        for name, tensor in block.tensors().items():
            assert torch.equal(tensor, same.blocks[key].tensors()[name])
            assert not torch.equal(tensor, other.blocks[key].tensors()[name])


def test_random_adapters_go_where_they_are_told(general: GeneralInfo) -> None:
    adapter = random_adapter(general, "lora", 3, 0, layers=[3], sites=[Site.FFN_UP, Site.FFN_DOWN])
    assert set(adapter.blocks) == {(3, Site.FFN_UP), (3, Site.FFN_DOWN)}
    assert (adapter.kind, adapter.rank) == ("lora", 3)
    with pytest.raises(InvalidAdapterError, match="below plot_layers"):
        random_adapter(general, "lora", 3, 0, layers=[0])
    with pytest.raises(InvalidAdapterError, match="'prefix' is unknown; known are bottleneck, lora"):
        random_adapter(general, "prefix", 3, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_its_name_and_rank(general: GeneralInfo, kind: str) -> None:
    adapter = random_adapter(general, kind, 3, 0, sites=KINDS[kind].sites)
    assert (adapter.kind, adapter.rank) == (kind, 3 if KINDS[kind].has_rank else 0)
