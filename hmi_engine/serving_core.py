"""What every engine consists of: memory, tables, the model, and the flow of batches through them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import hmi_kernels
from hmi_engine.errors import HmiError, MissPolicyWarning
from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.knowledge.sizes import parse_bytes
from hmi_engine.memory.device_choice import open_streams
from hmi_engine.memory.device_rows import DeviceRows
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.memory.residency import AdapterResidency
from hmi_engine.memory.streams import DeviceStreams
from hmi_engine.memory.tenant_reader import Digest, digest_of
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.linear import has_bfloat16_products
from hmi_engine.pipeline.admission import AdmittedRequest, admit
from hmi_engine.pipeline.batch_compute import BatchCompute, HostCompute
from hmi_engine.pipeline.device_compute import DeviceCompute
from hmi_engine.pipeline.flow import Flow
from hmi_engine.pipeline.layer_graphs import LayerGraphs
from hmi_engine.pipeline.respond import respond
from hmi_engine.pipeline.stage_clock import StageClock, Trace, hidden_share
from hmi_engine.pipeline.step import BatchItem, BatchResult, BatchRunner, PreparedBatch
from hmi_engine.request import Request, Response, Timing
from hmi_engine.serving_memory import release_memory, reserving_memory
from hmi_engine.serving_options import EngineOptions
from hmi_engine.serving_traffic import open_traffic, start_updates
from hmi_engine.store import Store

__all__ = [
    "BatchFlow",
    "EngineStatistics",
    "ServingCore",
    "WaitingBatch",
    "compute_dtype",
    "device_bytes_of",
    "open_plots",
    "open_residency",
    "product_dtype",
]


@dataclass
class EngineStatistics:
    """Counts since the engine started.

    ``stages`` holds the fields of ``StageTimes`` for each stage, and ``hidden_share`` what part of the time
    of fetching and searching compute did not wait for, None where there was none. ``costs`` holds the
    fields of ``StageCoefficients``, seconds fitted to what the stages took, None but for ``AsyncEngine``.
    ``plot`` and ``adapters``
    hold the fields of ``PlotStatistics`` (tokens, windows) and ``ResidencyStatistics`` (tenants, bytes);
    ``host_adapters`` those of ``HostStatistics``, or None where host memory is no tier of its own;
    ``traffic`` and ``updates`` those of ``TrafficStatistics`` and ``UpdateStatistics``, or None where the
    engine does neither. ``generation`` holds those of ``GenerationStatistics``, and
    ``shared_tokens`` of prompts that began at their tenant's first adapted layer; None but for decoders.
    """

    requests: int = 0
    errors: int = 0
    batches: int = 0
    tokens: int = 0
    prepare_seconds: float = 0.0
    compute_seconds: float = 0.0
    resident_tenants: int = 0
    resident_bytes: int = 0
    stages: dict[str, dict[str, int | float]] | None = None
    hidden_share: float | None = None
    costs: dict[str, dict[str, float]] | None = None
    plot: dict[str, int] | None = None
    adapters: dict[str, int] | None = None
    host_adapters: dict[str, int] | None = None
    traffic: dict[str, int | float | str | None] | None = None
    updates: dict[str, int | str | None] | None = None
    generation: dict[str, int] | None = None

    def count_answers(self, answers: int, errors: int) -> None:
        """Counts requests whose callers have their answers, and how many of those are errors."""
        self.requests += answers
        self.errors += errors


class WaitingBatch(NamedTuple):
    """What an admitted request asks of a batch.

    Attributes:
        weights_key: names the tenant's weights; requests of one key are one segment of a batch.
        num_tokens: that it has.
        adapter_bytes: that the tenant takes of the memory which batches have.
    """

    weights_key: Digest
    num_tokens: int
    adapter_bytes: int


BatchFlow = Flow[Sequence[BatchItem], PreparedBatch, BatchResult]


class ServingCore:
    """Opens what an engine needs over a store, and closes it. What it runs, one thread runs at a time."""

    def __init__(
        self, store: Store, options: EngineOptions, look_ahead: Callable[[], None] | None = None
    ) -> None:
        """Opens; raises as :class:`hmi_engine.Engine` does. ``look_ahead`` is that of a flow."""
        self.store = store
        self.options = options
        self.trace = None if options.trace is None else Trace()
        self.clock = StageClock(self.trace)
        self.statistics = EngineStatistics()
        self.streams = open_streams(options.device)
        with reserving_memory(self, store, options, computes_on_gpu=self.streams.is_asynchronous):
            self._open(look_ahead)

    def _open(self, look_ahead: Callable[[], None] | None) -> None:
        store, options = self.store, self.options
        self._dtype = compute_dtype(options, self.streams)
        device_bytes = device_bytes_of(options, self.streams)
        self.residency = open_residency(
            store,
            options,
            self.streams,
            device_bytes,
            self._dtype,
            batches_in_flight=options.pipeline_depth,
        )
        # In bytes of float32, in which the catalog reckons.
        store.catalog.arena_bytes[self] = 4 * self.residency.arena.memory.numel()
        self.residency.load_pinned(store.tenants.pinned())
        self.plots = open_plots(store, options)
        self.traffic = open_traffic(store, options)
        self.runner = BatchRunner(
            store.general,
            store.model,
            self.plots,
            self.residency,
            miss=options.miss,
            exact_budget=options.exact_budget,
            recorder=self.traffic.recorder if self.traffic is not None else None,
            clock=self.clock,
            computer=self._computer(device_bytes),
        )
        self.flow: BatchFlow = Flow(
            self.runner,
            depth=options.pipeline_depth,
            waiting=lambda: self.clock.waiting("compute"),
            look_ahead=look_ahead,
        )
        self._warned: set[str] = set()
        self._updater = start_updates(store, options, self.traffic)

    def _computer(self, device_bytes: int) -> BatchCompute:
        store, streams, options = self.store, self.streams, self.options
        if not streams.is_asynchronous:
            shared = store.model.with_products_in(product_dtype(options, streams))
            return HostCompute(store.general, shared, self.clock)
        model = HierarchicalBert.load(
            store.general_folder, store.general.plot_layers, streams.device, self._dtype
        )
        graphs = None
        if options.device_graphs:
            graphs = LayerGraphs(store.general, model, streams, options.max_batch_tokens)
        return DeviceCompute(
            store.general,
            model,
            streams,
            DeviceRows(streams, device_bytes - self.residency.arena.capacity_bytes),
            batches_in_flight=options.pipeline_depth,
            clock=self.clock,
            graphs=graphs,
        )

    def use_backend(self) -> AbstractContextManager[None]:
        """The kernels that the options ask for, in the block."""
        return hmi_kernels.use_backend(self.options.backend)

    def admit(self, requests: Sequence[Request]) -> list[AdmittedRequest | HmiError]:
        """Finds tenants and tokenises; one result for each request."""
        with self.clock.working("tokenise", self.statistics.batches):
            return admit(
                requests,
                self.store.tenants,
                self.store.encoder,
                vocab_size=self.store.general.vocab_size,
            )

    def describe(self, admitted: AdmittedRequest) -> WaitingBatch:
        """What a request asks of a batch."""
        tenant = admitted.tenant
        return WaitingBatch(
            weights_key=digest_of(tenant),
            num_tokens=len(admitted.encoded.input_ids),
            adapter_bytes=self.residency.batch_bytes_of(tenant),
        )

    def respond(
        self, admitted: Sequence[AdmittedRequest], result: BatchResult, queued: Sequence[float]
    ) -> list[Response]:
        """Responses of a batch, whose requests waited since ``queued`` (seconds of perf_counter)."""
        with self.clock.working("respond", result.number):
            responses = []
            for request, output, since in zip(admitted, result.outputs, queued, strict=True):
                if isinstance(output, HmiError):
                    responses.append(Response.failed(request.request, output))
                    continue
                timing = Timing(result.started - since, result.prepare_seconds, result.compute_seconds)
                responses.append(respond(request, output, timing, self.store.encoder))
        self.statistics.batches += 1
        self.statistics.tokens += sum(len(request.encoded.input_ids) for request in admitted)
        self.statistics.prepare_seconds += result.prepare_seconds
        self.statistics.compute_seconds += result.compute_seconds
        return responses

    def warn_of_mismatches(self, tenants: Iterable[TenantInfo], stacklevel: int) -> None:
        """Says once for each tenant that it was trained under another policy, which costs accuracy."""
        if self.plots is None:
            return
        # Under a budget most misses are composed: training for it is training for back-off.
        miss = self.options.miss
        served = "backoff" if miss == "budget" else miss
        for tenant in {tenant.name: tenant for tenant in tenants}.values():
            trained = tenant.card.get("training", {}).get("settings", {}).get("miss", served)
            if trained != served and tenant.name not in self._warned:
                self._warned.add(tenant.name)
                warnings.warn(
                    f"tenant {tenant.name!r} was trained for miss={trained!r} and is served with "
                    f"miss={miss!r}; its accuracy may suffer",
                    MissPolicyWarning,
                    stacklevel=stacklevel + 1,
                )

    def current_statistics(self) -> EngineStatistics:
        """All counts, as they are now."""
        current = EngineStatistics(**vars(self.statistics))
        current.resident_tenants = self.residency.num_resident
        current.resident_bytes = self.residency.arena.used_bytes
        stages = self.clock.times()
        current.stages = {stage: asdict(times) for stage, times in stages.items()}
        current.hidden_share = hidden_share(stages)
        current.plot = asdict(self.runner.plot_statistics)
        current.adapters = asdict(self.residency.statistics)
        host = self.residency.host_statistics
        current.host_adapters = None if host is None else asdict(host)
        current.traffic = asdict(self.traffic.statistics) if self.traffic is not None else None
        current.updates = asdict(self._updater.statistics) if self._updater is not None else None
        return current

    def close(self) -> None:
        """Gives memory back, saves what was counted of traffic and writes the trace."""
        self.store.catalog.arena_bytes.pop(self, None)
        self.flow.close()
        if self._updater is not None:
            self._updater.close()
        if self.traffic is not None:
            self.traffic.close()
        if self.plots is not None:
            self.plots.close()
        self.residency.close()
        release_memory(self, self.options)
        if self.trace is not None and self.options.trace is not None:
            self.trace.write(Path(self.options.trace))


def compute_dtype(options: EngineOptions, streams: DeviceStreams) -> torch.dtype:
    """Of hidden states and adapters on the device; raises ValueError where there is no such thing."""
    products = product_dtype(options, streams)
    return products if streams.is_asynchronous else streams.preferred_dtype


def product_dtype(options: EngineOptions, streams: DeviceStreams) -> torch.dtype:
    """Of products with the base's upper layers; raises ValueError likewise."""
    dtype: torch.dtype = streams.preferred_dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    if streams.is_asynchronous or dtype is torch.float32:
        return dtype
    if dtype is not torch.bfloat16:
        raise ValueError(
            f"dtype is {options.dtype!r}, but the engine computes on the CPU, in float32 or bfloat16: leave "
            "dtype out, or choose a GPU by device"
        )
    if not has_bfloat16_products():
        raise ValueError(
            f"dtype is {options.dtype!r}, but this processor has no instructions that multiply it "
            "(AVX512-BF16 or AMX): leave dtype out to compute in float32"
        )
    return dtype


def device_bytes_of(options: EngineOptions, streams: DeviceStreams) -> int:
    """The budget in the memory with which the device computes."""
    if options.device_memory != "auto":
        return parse_bytes(options.device_memory)
    if streams.is_asynchronous:
        return int(torch.cuda.mem_get_info(streams.device)[0]) // 2
    return parse_bytes(options.host_memory)


def open_plots(store: Store, options: EngineOptions) -> PlotLibrary | None:
    """The tables of a store; None where no layers are looked up."""
    if not store.general.plot_layers:
        return None
    return PlotLibrary(
        store.layout,
        store.catalog,
        store.general,
        overlay_bytes=parse_bytes(options.overlay_memory),
        domain_layers=store.domain_layers,
    )


def open_residency(
    store: Store,
    options: EngineOptions,
    streams: DeviceStreams,
    device_bytes: int,
    dtype: torch.dtype,
    *,
    batches_in_flight: int,
) -> AdapterResidency:
    """The memory for a store's tenants, where a device computes with ``device_bytes`` of it in ``dtype``."""
    host_bytes: int | None = parse_bytes(options.host_memory)
    arena_bytes = device_bytes
    if streams.is_asynchronous:
        arena_bytes //= 2  # the other half is for PLOT tables
    elif options.device_memory == "auto":  # the CPU computes in host memory
        host_bytes = None
    return AdapterResidency(
        store.layout,
        store.catalog,
        store.general,
        arena_bytes,
        host_bytes=host_bytes,
        streams=streams,
        batches_in_flight=batches_in_flight,
        read_timeout=options.read_timeout,
        dtype=dtype,
    )
