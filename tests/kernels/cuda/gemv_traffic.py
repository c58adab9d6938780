"""What the adapter kernels for a few tokens move, counted by the emulator, beside the least."""

from __future__ import annotations

from typing import NamedTuple

from emulator.harness import counters, emulated
from kernels.cuda.adapter_cases import AdapterCase, make_case

__all__ = ["TrafficRow", "traffic_rows"]


class TrafficRow(NamedTuple):
    """One shape in the table of docs/kernels.md; bytes of global memory, both ways, over all launches."""

    shape: str
    launches: int
    moved_bytes: int
    """Each block's 32-byte sectors, once a block: tables, and sums between two launches, included."""
    least_bytes: int
    """Weights once a segment, inputs and outputs read once, outputs written once."""
    excess_wavefronts: int
    """Accesses to shared memory beyond the fewest: bank conflicts."""

    @property
    def ratio(self) -> float:
        """Moved to least."""
        return self.moved_bytes / self.least_bytes


def traffic_rows() -> list[TrafficRow]:
    """Small batches do: what grows with the batch is the number of blocks, not what one of them does."""
    bottlenecks = (
        # hidden size, rank, segments, tokens of each, layer norm
        (768, 16, 4, 1, False),
        (768, 64, 32, 1, False),
        (768, 64, 1, 1, False),
        (1024, 32, 8, 4, True),
        (4096, 16, 1, 2, False),
    )
    loras = (
        # input size, output sizes, rank, segments, tokens of each
        (768, (768, 768, 768), 16, 2, 1),
        (4096, (4096, 1024, 1024), 16, 1, 1),
        (4096, (4096,), 64, 1, 4),
    )
    rows = []
    for hidden_size, rank, segments, tokens, has_layer_norm in bottlenecks:
        case = make_case(
            [tokens] * segments,
            hidden_size=hidden_size,
            ranks=[[rank] * segments],
            activations=["gelu"] * segments,
            has_layer_norm=has_layer_norm,
        )
        norm = " and layer norm" if has_layer_norm else ""
        rows.append(_count(case, f"bottleneck {hidden_size}, rank {rank}{norm}; {segments} x {tokens}"))
    for input_size, output_sizes, rank, segments, tokens in loras:
        ranks = [[rank] * segments for _ in output_sizes]
        case = make_case([tokens] * segments, hidden_size=input_size, output_sizes=output_sizes, ranks=ranks)
        sizes = ", ".join(map(str, output_sizes))
        rows.append(_count(case, f"LoRA {input_size} to {sizes}, rank {rank}; {segments} x {tokens}"))
    return rows


def _count(case: AdapterCase, shape: str) -> TrafficRow:
    with emulated("count"):
        case.run()
        launches = counters()
    moved = sum(launch.reads.block_bytes + launch.writes.block_bytes for launch in launches)
    excess = sum(launch.excess_wavefronts for launch in launches)
    return TrafficRow(f"{shape} tokens", len(launches), moved, _least_bytes(case), excess)


def _least_bytes(case: AdapterCase) -> int:
    elements: int = 0 if case.layer_norm is None else 2 * case.output.shape[1]
    for rows, slot in case.segments():
        tokens = rows.stop - rows.start
        elements += tokens * (case.hidden_states.shape[1] + 2 * case.output.shape[1])
        for p in range(len(case.output_sizes)):
            elements += sum(part.numel() for part in case.blocks(p, slot))
            if case.slot_activations is None:
                elements -= 2  # the zeros that stand for LoRA's biases
    return elements * int(case.output.element_size())
