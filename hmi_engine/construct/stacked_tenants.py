"""The parameters of many tenants in tables with a row for each, so that one call computes or changes all.

A place of the adapters is one table, whose rows are the blocks that the grouped ops read from their arena;
each parameter of the heads is another, padded to the largest head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import hmi_kernels
from hmi_engine.construct.packed_batch import PackedBatch, Segments
from hmi_engine.construct.trainable_adapter import TrainableAdapter
from hmi_engine.construct.trainable_tenant import TrainableTenant
from hmi_engine.knowledge.adapters import KIND_OF_SITE, Site

__all__ = ["ParameterTable", "StackedAdapters", "StackedTenants"]

ROW_MULTIPLE = 16
"""Elements of 64 bytes: where rows begin, reads of whole vectors are aligned."""


class ParameterTable(nn.Module):
    """Parameters of the same names in N modules, laid end to end: ``rows`` float32 [N, elements].

    A parameter that differs in the number of its first dimension has room for the longest.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self._shapes = [
            {name: parameter.shape for name, parameter in module.named_parameters()} for module in modules
        ]
        self._sizes = [max(shapes[name].numel() for shapes in self._shapes) for name in self._shapes[0]]
        padding = -sum(self._sizes) % ROW_MULTIPLE
        rows = torch.zeros(len(modules), sum(self._sizes) + padding)
        decays = [
            torch.full((size,), float(len(shape) > 1))
            for size, shape in zip(self._sizes, self._shapes[0].values(), strict=True)
        ]
        self.decays = functional.pad(torch.cat([torch.zeros(0), *decays]), (0, padding))
        """1 for elements of matrices, which weight decay is for; 0 for the others; float32 [elements]."""
        self.rows = nn.Parameter(rows)
        for slot, module in enumerate(modules):
            own = self.parameters_of(self.rows.detach()[slot], slot)
            for name, parameter in module.named_parameters():
                own[name].copy_(parameter.detach())

    def parameters_of(self, row: Tensor, slot: int) -> dict[str, Tensor]:
        """Views of the parameters of one slot, in a row [elements] of its own values or gradients."""
        parts = row[: sum(self._sizes)].split(self._sizes)
        return {
            name: part[: shape.numel()].view(shape)
            for (name, shape), part in zip(self._shapes[slot].items(), parts, strict=True)
        }

    def detached(self, slot: int) -> dict[str, Tensor]:
        """Views of one slot's parameters as they are now, without gradients."""
        return self.parameters_of(self.rows.detach()[slot], slot)


class _Place(nn.Module):
    """The blocks of one layer and site as an arena of which each row is a slot's block."""

    def __init__(self, site: Site, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.table = ParameterTable(blocks)
        self._kind = KIND_OF_SITE[site].name
        num_slots, row_size = self.table.rows.shape
        self._offsets = torch.arange(num_slots) * row_size
        shapes = {name: parameter.shape for name, parameter in blocks[0].named_parameters()}
        self._rank = {"bottleneck": lambda: shapes["down"][1], "lora": lambda: shapes["a"][1]}.get(
            self._kind, lambda: 1
        )()
        self._ranks = torch.full((num_slots,), self._rank, dtype=torch.int32)
        self._scales = torch.tensor([float(getattr(block, "scale", 1.0)) for block in blocks])
        names = [getattr(block, "activation", hmi_kernels.ACTIVATIONS[0]) for block in blocks]
        numbers = [hmi_kernels.ACTIVATIONS.index(name) for name in names]
        self._activations = torch.tensor(numbers, dtype=torch.int32)

    def change(self, output: Tensor, hidden_states: Tensor, segments: Segments) -> Tensor:
        """What each row's block makes of output [rows, out]; blocks with matrices read [rows, in]."""
        batch = (hidden_states, self.table.rows.view(-1), segments.offsets, segments.slots)
        match self._kind:
            case "lora":
                tables = (table[None] for table in (self._offsets, self._ranks, self._scales))
                sizes = [output.shape[1]]
                return output + hmi_kernels.grouped_lora_delta(
                    *batch, *tables, output_sizes=sizes, max_rank=self._rank
                )
            case "bottleneck":
                slots = (self._offsets, self._ranks, self._activations, self._scales)
                return output + hmi_kernels.grouped_bottleneck_delta(*batch, *slots, max_rank=self._rank)
            case "ia3":
                return output * self._vectors(output, segments)
            case _:
                return output + self._vectors(output, segments)

    def _vectors(self, output: Tensor, segments: Segments) -> Tensor:
        """Each row's vector, [rows, out]: the product of 1 with a matrix of one row."""
        ones = output.new_ones(output.shape[0], 1)
        columns = torch.full_like(self._ranks, output.shape[1])
        slots = (self._offsets, self._ranks, columns)
        arena = self.table.rows.view(-1)
        return hmi_kernels.grouped_product(
            ones, arena, segments.offsets, segments.slots, *slots, output_size=output.shape[1]
        )


class StackedAdapters(nn.Module):
    """N adapters of one form, as the trainable layers take one tenant's.

    A batch is bound before the layers run: its segments say whose rows are whose.
    """

    def __init__(self, adapters: Sequence[TrainableAdapter]) -> None:
        super().__init__()
        first = adapters[0]
        self.places, self.first_layer = first.places, first.first_layer
        self._names = dict(zip(first.places, first.blocks, strict=True))
        self.blocks = nn.ModuleDict(
            {
                name: _Place(site, [adapter.blocks[name] for adapter in adapters])
                for (_, site), name in self._names.items()
            }
        )
        self._segments: dict[int, Segments] = {}

    def bind(self, batch: PackedBatch) -> None:
        """Makes this batch the one whose rows follow: those of all tokens, or one of each sequence."""
        # By their number: where there are as many sequences as tokens, the two are the same.
        self._segments = {
            batch.num_sequences: batch.sequence_segments(),
            batch.num_tokens: batch.token_segments(),
        }

    def is_used(self, layer: int, site: str) -> bool:
        """Whether there are blocks at this place."""
        return (layer, Site(site)) in self._names

    def change(self, layer: int, site: str, output: Tensor, hidden_states: Tensor) -> Tensor:
        """What the blocks at this place make of ``output`` [rows, out], with gradients."""
        place = self.blocks[self._names[layer, Site(site)]]
        assert isinstance(place, _Place)
        return place.change(output, hidden_states, self._segments[output.shape[0]])


class StackedTenants(nn.Module):
    """Adapters and heads of N tenants; a slot is a tenant's number."""

    def __init__(self, tenants: Sequence[TrainableTenant]) -> None:
        """Copies the tenants' parameters.

        Raises:
            ValueError: their adapters have not the same places and ranks.
        """
        super().__init__()
        forms = {_form(tenant.adapter) for tenant in tenants}
        if len(forms) != 1:
            raise ValueError("tenants can be stacked only if their adapters are of one form")
        self._tenants = list(tenants)
        self.adapters = StackedAdapters([tenant.adapter for tenant in tenants])
        self.heads = ParameterTable([tenant.head for tenant in tenants])

    def tables(self) -> list[ParameterTable]:
        """All tables, in one order."""
        return [module for module in self.modules() if isinstance(module, ParameterTable)]

    def outputs(self, rows: Sequence[tuple[int, Tensor]]) -> Iterator[Tensor]:
        """For each (slot, rows that its head reads): the head's outputs, with gradients."""
        heads = self.heads.rows.unbind(0)  # once: each row's own gradient would be as large as the table
        for slot, read in rows:
            parameters = self.heads.parameters_of(heads[slot], slot)
            yield torch.func.functional_call(self._tenants[slot].head, parameters, (read,))

    @torch.no_grad()
    def save(self, slot: int) -> TrainableTenant:
        """Copies the slot's parameters into the tenant that they came from, and returns it."""
        tenant = self._tenants[slot]
        for name, place in self.adapters.blocks.items():
            assert isinstance(place, _Place)
            _copy(place.table.detached(slot), tenant.adapter.blocks[name])
        _copy(self.heads.detached(slot), tenant.head)
        return tenant


def _form(adapter: TrainableAdapter) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in adapter.named_parameters())


def _copy(values: dict[str, Tensor], module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(values[name])
