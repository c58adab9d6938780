"""A machine with GPUs as its data sheets and our assumptions have it; nothing here was measured on one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from benchmarks.simulation.machine import Costs, Disk, Link, Machine
from benchmarks.tenant_fleet import FLEET
from hmi_engine.schedule.cost_model import StageCoefficients

__all__ = ["LINKS", "STATED", "Stated", "gpu_machine", "tenant_sizes"]


@dataclass(frozen=True)
class Stated:
    """A number that the simulation takes as it is, and where it is from."""

    value: float
    unit: str
    origin: str


LINKS = {"25 GB/s": 25e9, "55 GB/s": 55e9}

STATED = {
    "hidden size": Stated(768, "", "BERT-base (Devlin et al. 2019)"),
    "layers": Stated(12, "", "BERT-base"),
    "layers looked up, K": Stated(6, "", "half of them, as HMI's default is"),
    "bytes of a parameter": Stated(2, "bytes", "bfloat16"),
    "peak compute": Stated(
        989.4e12, "FLOP/s", "NVIDIA H100 SXM5, bfloat16 without sparsity (H100 architecture white paper)"
    ),
    "share of the peak that is reached": Stated(0.4, "", "assumption"),
    "device memory bandwidth": Stated(3.35e12, "bytes/s", "NVIDIA H100 SXM5 data sheet"),
    "share of the bandwidth that is reached": Stated(0.7, "", "assumption"),
    "fixed time of a batch's compute": Stated(100e-6, "s", "assumption: launches, captured in a graph"),
    "adapter memory of a device, of all tenants' bytes": Stated(0.05, "", "setting"),
    "host memory for a device's adapters": Stated(
        128e9, "bytes", "assumption: 1 of 2 TB for the 8 devices of a machine"
    ),
    "host link, a copy's own time": Stated(1e-6, "s", "assumption: one copy for each tenant and layer"),
    "disk, time to answer": Stated(100e-6, "s", "assumption: flash"),
    "disk, bandwidth": Stated(6.5e9, "bytes/s", "Samsung PM9A3, sequential reads, one for each device"),
    "disk, reads in flight": Stated(32, "", "assumption"),
    "tokens of a batch, at most": Stated(8192, "tokens", "setting: the engine's default"),
    "batches in flight": Stated(3, "", "setting"),
}


def _stated(name: str) -> float:
    return STATED[name].value


def tenant_sizes(num_tenants: int) -> npt.NDArray[np.int64]:
    """Bytes of each tenant, int64 [n]: the kinds and ranks of the fleet in turn, on the upper layers."""
    hidden = int(_stated("hidden size"))
    layers = int(_stated("layers") - _stated("layers looked up, K"))
    sizes = [
        int((layers * _elements(kind, rank, hidden) + 4 * hidden) * _stated("bytes of a parameter"))
        for kind, rank in FLEET
    ]
    return np.resize(np.array(sizes, dtype=np.int64), num_tenants)


def _elements(kind: str, rank: int, hidden: int) -> int:
    """Parameters of an adapter in one layer."""
    if kind == "lora":  # on query and value
        return 2 * 2 * hidden * rank
    if kind == "bottleneck":
        return 2 * hidden * rank + rank + hidden
    if kind == "ia3":  # keys, values, the wide layer
        return 2 * hidden + 4 * hidden
    return 4 * hidden + 4 * hidden + hidden + 4 * hidden  # BitFit: biases of linears and norms


def gpu_machine(
    host: Costs,
    bytes_per_second: float,
    sizes: npt.NDArray[np.int64],
    *,
    host_parts: float = 1.0,
    depth: int | None = None,
    waits_for_layers: bool = True,
) -> Machine:
    """One H100-class device with its part of a host.

    Args:
        host: what the processor's stages cost, as measured on a CPU; its compute is not used.
        bytes_per_second: of the link from host memory.
        sizes: int64 [tenants], bytes of each.
        host_parts: by how much less the processor's stages take, as by more processes or compiled code.
        depth: batches in flight, where it is not what is stated.
        waits_for_layers: whether a layer waits for its own copies only, and not for all.
    """
    hidden = _stated("hidden size")
    layers = int(_stated("layers") - _stated("layers looked up, K"))
    flops = 2 * 12 * hidden**2 * layers  # four projections of H by H, two of H by 4 H
    bandwidth = _stated("device memory bandwidth") * _stated("share of the bandwidth that is reached")
    row_bytes = 3 * hidden * _stated("bytes of a parameter")  # a unigram's and two slots of bigrams
    per_token = flops / (_stated("peak compute") * _stated("share of the peak that is reached"))
    costs = Costs(
        admit=_divided(host.admit, host_parts),
        form=_divided(host.form, host_parts),
        # The bytes go over the link instead.
        fetch=_divided(replace(host.fetch, per_byte=0.0), host_parts),
        search=_divided(host.search, host_parts),
        compute=StageCoefficients(
            _stated("fixed time of a batch's compute"), per_token + row_bytes / bandwidth, 0.0, 1 / bandwidth
        ),
        respond=_divided(host.respond, host_parts),
    )
    return Machine(
        costs=costs,
        arena_bytes=int(_stated("adapter memory of a device, of all tenants' bytes") * int(sizes.sum())),
        host_bytes=int(_stated("host memory for a device's adapters")),
        disk=Disk(
            _stated("disk, time to answer"), _stated("disk, bandwidth"), int(_stated("disk, reads in flight"))
        ),
        link=Link(_stated("host link, a copy's own time"), bytes_per_second),
        upper_layers=layers if waits_for_layers else 1,
        depth=depth or int(_stated("batches in flight")),
        max_batch_tokens=int(_stated("tokens of a batch, at most")),
    )


def _divided(cost: StageCoefficients, parts: float) -> StageCoefficients:
    return StageCoefficients(
        cost.fixed / parts, cost.per_token / parts, cost.per_tenant / parts, cost.per_byte / parts
    )
