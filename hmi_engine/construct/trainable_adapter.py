"""Adapters as parameters that an optimizer changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hmi_engine.construct.trainable_layers import Adapters
from hmi_engine.errors import InvalidAdapterError
from hmi_engine.knowledge.adapters import (
    KIND_OF_SITE,
    KINDS,
    QUERY_KEY_VALUE,
    Adapter,
    BiasBlock,
    Block,
    BottleneckBlock,
    LoraBlock,
    ScaleBlock,
    Site,
    site_sizes,
)
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.models.activations import ACTIVATION_FUNCTIONS

__all__ = ["AppliedAdapter", "TrainableAdapter", "TrainableBlock"]

_INITIAL_DEVIATION = 0.02


class TrainableBlock(nn.Module, ABC):
    """One block as parameters."""

    @abstractmethod
    def forward(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        """What the block makes of output [T, out]; may read hidden_states [T, in]. Changes neither."""

    @abstractmethod
    def to_block(self) -> Block:
        """A copy of the current parameters, to store and serve."""


class _TrainableBottleneck(TrainableBlock):
    """Adds ``activation(x @ down + down_bias) @ up + up_bias``; zero at first, because ``up`` is."""

    def __init__(self, inputs: int, rank: int, activation: str, generator: torch.Generator) -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Parameter(torch.randn(inputs, rank, generator=generator) * _INITIAL_DEVIATION)
        self.down_bias = nn.Parameter(torch.zeros(rank))
        self.up = nn.Parameter(torch.zeros(rank, inputs))
        self.up_bias = nn.Parameter(torch.zeros(inputs))

    def forward(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        inner = torch.addmm(self.down_bias, hidden_states, self.down)
        inner = ACTIVATION_FUNCTIONS[self.activation](inner)
        return output + torch.addmm(self.up_bias, inner, self.up)

    def to_block(self) -> BottleneckBlock:
        return BottleneckBlock(
            down=self.down.detach().clone(),
            down_bias=self.down_bias.detach().clone(),
            up=self.up.detach().clone(),
            up_bias=self.up_bias.detach().clone(),
            activation=self.activation,
        )


class _TrainableLora(TrainableBlock):
    """Adds ``scale * (x @ a) @ b``; zero at first, because ``b`` is; ``a`` starts as PEFT starts it."""

    def __init__(
        self, inputs: int, outputs: int, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.scale = scale
        bound = inputs**-0.5  # kaiming_uniform_ with a = sqrt(5)
        self.a = nn.Parameter((torch.rand(inputs, rank, generator=generator) * 2 - 1) * bound)
        self.b = nn.Parameter(torch.zeros(rank, outputs))

    def forward(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        return output + (self.scale * (hidden_states @ self.a)) @ self.b

    def to_block(self) -> LoraBlock:
        return LoraBlock(self.a.detach().clone(), self.b.detach().clone(), self.scale)


class _TrainableScale(TrainableBlock):
    """Multiplies rows by a vector that starts as ones."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.ones(size))

    def forward(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        return output * self.vector

    def to_block(self) -> ScaleBlock:
        return ScaleBlock(self.vector.detach().clone())


class _TrainableBias(TrainableBlock):
    """Adds a vector that starts as zeros to the base's bias."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(size))

    def forward(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        return output + self.vector

    def to_block(self) -> BiasBlock:
        return BiasBlock(self.vector.detach().clone())


class TrainableAdapter(nn.Module):
    """The blocks of one tenant as parameters, named ``blocks.layer_003_query.a`` and so on.

    It changes nothing before the first optimizer step: the second matrix of each block starts at zero, scales
    start at one and biases at zero.
    """

    def __init__(
        self,
        general: GeneralInfo,
        *,
        kind: str,
        rank: int,
        layers: Iterable[int],
        generator: torch.Generator,
        sites: Iterable[Site] | None = None,
        activation: str = "gelu",
        lora_scale: float = 2.0,
    ) -> None:
        """Makes blocks of ``kind`` (a key of ``KINDS``) at each of ``layers`` and ``sites``.

        The default are the kind's usual sites. Kinds without a rank do not look at ``rank``.

        Raises:
            InvalidAdapterError: kind, rank, layers or sites do not fit each other or ``general``.
        """
        super().__init__()
        chosen = KINDS[kind].default_sites if sites is None else tuple(sites)
        self.places = tuple((layer, site) for layer in sorted(set(layers)) for site in chosen)

        def block(site: Site) -> TrainableBlock:
            if KIND_OF_SITE[site].name != kind:
                raise InvalidAdapterError(
                    f"site {site} is not one of {kind} adapters, which have {', '.join(KINDS[kind].sites)}"
                )
            inputs, outputs = site_sizes(site, general)
            match kind:
                case "lora":
                    return _TrainableLora(inputs, outputs, rank, lora_scale, generator)
                case "ia3":
                    return _TrainableScale(outputs)
                case "bitfit":
                    return _TrainableBias(outputs)
                case _:
                    return _TrainableBottleneck(inputs, rank, activation, generator)

        self.blocks = nn.ModuleDict({_name(layer, site): block(site) for layer, site in self.places})
        self.to_adapter().validate(general)

    @property
    def first_layer(self) -> int:
        """The lowest layer with a block: nothing below it depends on the parameters."""
        return min(layer for layer, _ in self.places)

    def is_used(self, layer: int, site: str) -> bool:
        """Whether there is a block at this place."""
        return _name(layer, site) in self.blocks

    def change(self, layer: int, site: str, output: Tensor, hidden_states: Tensor) -> Tensor:
        """What the block at this place makes of ``output`` [T, out], with gradients.

        ``hidden_states`` [T, in] are what blocks with matrices read; neither is changed in place.
        """
        result: Tensor = self.blocks[_name(layer, site)](output, hidden_states)
        return result

    def to_adapter(self) -> Adapter:
        """A copy of the current parameters as an adapter to store and serve."""
        blocks: dict[tuple[int, Site], Block] = {}
        for layer, site in self.places:
            block = self.blocks[_name(layer, site)]
            assert isinstance(block, TrainableBlock)
            blocks[layer, site] = block.to_block()
        return Adapter(blocks)


def _name(layer: int, site: str) -> str:
    return f"layer_{layer:03d}_{Site(site).value.replace('.', '_')}"


class AppliedAdapter:
    """Adapters that are trained, as the serving layers see adapters.

    Only without gradients: the layers hand out slices of wider tensors to be changed in place.
    """

    def __init__(self, adapter: Adapters) -> None:
        self._adapter = adapter

    def is_used(self, layer: int, site: str) -> bool:
        """Whether there is a block at this place."""
        return self._adapter.is_used(layer, site)

    def apply(self, layer: int, site: str, output: Tensor, hidden_states: Tensor, *, readout: bool) -> None:
        """Changes ``output`` [T, out] in place as the block does for hidden_states [T, in]."""
        output.copy_(self._adapter.change(layer, site, output, hidden_states))

    def apply_projections(self, layer: int, output: Tensor, hidden_states: Tensor) -> None:
        """Changes queries, keys and values [T, 3H] in place, where there are blocks."""
        for site, columns in zip(QUERY_KEY_VALUE, output.chunk(len(QUERY_KEY_VALUE), dim=-1), strict=True):
            if self.is_used(layer, site):
                self.apply(layer, site, columns, hidden_states, readout=False)
