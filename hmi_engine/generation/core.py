"""What an engine over a store of decoders consists of: memory, tables, the model, the loop of its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch

import hmi_kernels
from hmi_engine.errors import HmiError, InvalidRequestError, TextTooLongError
from hmi_engine.generation.adapter_budget import AdapterBudget
from hmi_engine.generation.block_pool import BlockPool, PrefixKeys
from hmi_engine.generation.cache import KeyValueCache
from hmi_engine.generation.device_steps import DeviceSteps
from hmi_engine.generation.loop import GenerationLoop
from hmi_engine.generation.sequence import DecoderSequence, FinishReason
from hmi_engine.generation.shared_prefixes import SharedPrefixes
from hmi_engine.generation.step import StepRunner
from hmi_engine.generation.step_compute import HostSteps, StepCompute
from hmi_engine.generation.text_stream import TextStream
from hmi_engine.generation.text_traffic import TextTraffic
from hmi_engine.generation.token_choice import TokenChooser
from hmi_engine.inbox import Emit
from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.knowledge.sizes import parse_bytes
from hmi_engine.memory.device_choice import open_streams
from hmi_engine.memory.device_rows import DeviceRows
from hmi_engine.models.gpt2 import HierarchicalGpt2
from hmi_engine.pipeline.admission import AdmittedRequest, admit
from hmi_engine.pipeline.read_out import HeadOutput
from hmi_engine.pipeline.respond import respond
from hmi_engine.pipeline.stage_clock import StageClock, Trace
from hmi_engine.request import Request, Response, Timing, Usage
from hmi_engine.serving_core import (
    EngineStatistics,
    compute_dtype,
    device_bytes_of,
    open_plots,
    open_residency,
    product_dtype,
)
from hmi_engine.serving_memory import release_memory, reserving_memory
from hmi_engine.serving_options import EngineOptions
from hmi_engine.serving_traffic import open_traffic, start_updates
from hmi_engine.store import Store

__all__ = ["DecoderCore"]

Respond = Callable[[Response], None]


class DecoderCore:
    """Opens what an engine needs over a store of decoders, and closes it; one thread at a time uses it."""

    def __init__(self, store: Store, options: EngineOptions) -> None:
        """Opens; raises as :class:`hmi_engine.Engine` does."""
        self.store = store
        self.options = options
        self.trace = None if options.trace is None else Trace()
        self.clock = StageClock(self.trace)
        self.statistics = EngineStatistics()
        self.streams = open_streams(options.device)
        with reserving_memory(self, store, options, computes_on_gpu=self.streams.is_asynchronous):
            self._open()
        self._end_tokens = store.encoder.end_token_ids()

    def _open(self) -> None:
        store, options, general = self.store, self.options, self.store.general
        dtype, device_bytes = compute_dtype(options, self.streams), device_bytes_of(options, self.streams)
        # Of all texts under way there is one step at a time.
        self.residency = open_residency(
            store, options, self.streams, device_bytes, dtype, batches_in_flight=1
        )
        store.catalog.arena_bytes[self] = 4 * self.residency.arena.memory.numel()
        self.residency.load_pinned(store.tenants.pinned())
        self.plots = open_plots(store, options)
        block_bytes = KeyValueCache.bytes_per_token(general, dtype) * options.block_tokens
        num_blocks = max(1, parse_bytes(options.cache_memory) // block_bytes)
        cache = KeyValueCache(general, num_blocks, options.block_tokens, self.streams.device, dtype)
        self.shared: SharedPrefixes | None = None
        shared_bytes = parse_bytes(options.shared_prefix_memory)
        if options.prefix_cache == "shared" and shared_bytes:
            self.shared = SharedPrefixes(cache, general.plot_layers, shared_bytes)
        self.traffic = open_traffic(store, options)
        self.runner = StepRunner(
            general,
            store.decoder,
            self.plots,
            self.residency,
            self._computer(cache, dtype, device_bytes),
            miss=options.miss,
            exact_budget=options.exact_budget,
            recorder=None if self.traffic is None else self.traffic.recorder,
            shared=self.shared,
            clock=self.clock,
        )
        self._texts: TextTraffic | None = None
        if self.traffic is not None and self.plots is not None:
            self._texts = TextTraffic(self.traffic, self.plots, store.decoder, general.window)
        self._updater = start_updates(store, options, self.traffic)
        self.loop = GenerationLoop(
            self.runner,
            BlockPool(num_blocks),
            AdapterBudget(self.residency.batch_bytes_of, lambda: self.residency.batch_bytes),
            self._finish,
            block_size=options.block_tokens,
            max_step_tokens=options.max_step_tokens,
            max_running=options.max_running,
        )

    def _computer(self, cache: KeyValueCache, dtype: torch.dtype, device_bytes: int) -> StepCompute:
        store, general, streams = self.store, self.store.general, self.streams
        if not streams.is_asynchronous:
            decoder = store.decoder.with_products_in(product_dtype(self.options, streams))
            return HostSteps(decoder, cache, self.clock, self.shared)
        model = HierarchicalGpt2.load(store.general_folder, general.plot_layers, streams.device, dtype)
        rows = DeviceRows(streams, device_bytes - self.residency.arena.capacity_bytes)
        return DeviceSteps(
            general,
            model,
            streams,
            rows,
            cache,
            self.clock,
            self.shared,
            uses_graphs=self.options.device_graphs,
        )

    def use_backend(self) -> AbstractContextManager[None]:
        """The kernels that the options ask for, in the block."""
        return hmi_kernels.use_backend(self.options.backend)

    def admit(self, requests: Sequence[Request]) -> list[AdmittedRequest | HmiError]:
        """Finds tenants and tokenises; one result for each request."""
        with self.clock.working("tokenise", self.statistics.batches):
            admitted = admit(
                requests,
                self.store.tenants,
                self.store.encoder,
                vocab_size=self.store.general.vocab_size,
            )
        return [each if isinstance(each, HmiError) else self._checked(each) for each in admitted]

    def sequence(
        self, admitted: AdmittedRequest, respond: Respond, emit: Emit | None = None, *, arrived: float
    ) -> DecoderSequence:
        """What an admitted request, which ``arrived`` then (seconds of perf_counter), is for the loop.

        Raises:
            OverloadedError: the cache is too small for it.
        """
        request, tenant = admitted.request, admitted.tenant
        is_generating = tenant.head_kind == "generation"
        token_ids = list(admitted.encoded.input_ids)
        base_weights = self._base_weights(tenant)
        sequence = DecoderSequence(
            request=request,
            tenant=tenant,
            token_ids=token_ids,
            num_prompt=len(token_ids),
            is_generating=is_generating,
            end_tokens=self._end_tokens,
            most_tokens=self.store.general.max_positions,
            keys=self._keys(tenant, base_weights),
            base_weights=base_weights,
            respond=respond,
            tickets=([], []),
            arrived=arrived,
            emit=emit,
            truncated=admitted.encoded.truncated,
        )
        if is_generating:
            sequence.chooser = TokenChooser(request.sampling)
            sequence.text = TextStream(self.store.encoder.tokenizer, request.sampling.stop)
        self.loop.check_fits(sequence)
        [sequence.tickets] = self.residency.expect([[tenant]])
        return sequence

    def release(self, sequence: DecoderSequence) -> None:
        """Memory need not wait for it any more."""
        self.residency.release(sequence.tickets)

    def rest(self) -> None:
        """There is nothing to do for now: counts what texts that have ended asked for."""
        if self._texts is not None:
            self._texts.flush()

    def current_statistics(self) -> EngineStatistics:
        """All counts, as they are now."""
        current = EngineStatistics(**vars(self.statistics))
        current.resident_tenants = self.residency.num_resident
        current.resident_bytes = self.residency.arena.used_bytes
        stages = self.clock.times()
        current.stages = {stage: asdict(times) for stage, times in stages.items()}
        busy = {stage: times.busy_seconds for stage, times in stages.items()}
        current.prepare_seconds = busy.get("fetch", 0.0) + busy.get("search", 0.0)
        current.compute_seconds = busy.get("compute", 0.0)
        current.plot = asdict(self.runner.plot_statistics)
        current.adapters = asdict(self.residency.statistics)
        current.generation = asdict(self.loop.statistics)
        current.generation["shared_tokens"] = 0 if self.shared is None else self.shared.num_tokens
        current.batches = current.generation["steps"]
        current.traffic = asdict(self.traffic.statistics) if self.traffic is not None else None
        current.updates = asdict(self._updater.statistics) if self._updater is not None else None
        return current

    def close(self) -> None:
        """Gives memory back, saves what was counted of traffic and writes the trace."""
        self.store.catalog.arena_bytes.pop(self, None)
        if self._updater is not None:
            self._updater.close()
        if self.traffic is not None:
            self.rest()
            self.traffic.close()
        if self.plots is not None:
            self.plots.close()
        self.residency.close()
        release_memory(self, self.options)
        if self.trace is not None and self.options.trace is not None:
            self.trace.write(Path(self.options.trace))

    def _checked(self, admitted: AdmittedRequest) -> AdmittedRequest | HmiError:
        """What only a decoder minds: a prompt must leave a position for what follows it."""
        encoded, positions = admitted.encoded, self.store.general.max_positions
        if not encoded.input_ids:
            return InvalidRequestError("the prompt has no tokens; give it at least one")
        if admitted.tenant.head_kind != "generation":
            return admitted
        if encoded.truncated or len(encoded.input_ids) >= positions:
            return TextTooLongError(
                f"the prompt has {positions} tokens or more, but the model has {positions} positions for it "
                "and what follows; shorten it"
            )
        return admitted

    def _keys(self, tenant: TenantInfo, base_weights: bytes) -> PrefixKeys:
        """Names for the blocks of a tenant's sequences: its adapter's contents and what lies before it."""
        options = self.options
        salt = b"" if options.prefix_cache == "shared" else tenant.name.encode()
        if options.prefix_cache == "off":
            salt += time.monotonic_ns().to_bytes(8, "little") + id(tenant).to_bytes(8, "little")
        return PrefixKeys(tenant.sha256.encode() + b"\0" + base_weights, salt, options.block_tokens)

    def _base_weights(self, tenant: TenantInfo) -> bytes:
        """What a tenant's hidden states follow from before its first adapter, beside the tokens."""
        parts = [self.store.general.domain_layers, self.options.miss, *self._table_files(tenant.domain)]
        return "\0".join(parts).encode()

    def _table_files(self, domain: str) -> list[str]:
        """The files of the tables that a domain's rows come from: a change of one changes hidden states."""
        files = []
        name: str | None = domain
        while name is not None:
            info = self.store.domains[name]
            files.append(f"{info.layer_identity} {info.file}")
            name = info.parent
        return files

    def _finish(self, sequence: DecoderSequence, result: FinishReason | HeadOutput | HmiError) -> None:
        self.release(sequence)
        is_error = isinstance(result, HmiError)
        self.statistics.tokens += len(sequence.token_ids)
        if self._texts is not None and sequence.started is not None and not is_error:
            # Nobody asked for the row of a text's last token.
            self._texts.add(
                sequence.tenant.domain, sequence.token_ids[: -1 if sequence.num_generated else None]
            )
        sequence.respond(self._response(sequence, result))

    def _response(self, sequence: DecoderSequence, result: FinishReason | HeadOutput | HmiError) -> Response:
        if isinstance(result, HmiError):
            return Response.failed(sequence.request, result)
        now = time.perf_counter()
        started = now if sequence.started is None else sequence.started
        timing = Timing(
            queue_seconds=started - sequence.arrived, prepare_seconds=0.0, compute_seconds=now - started
        )
        if isinstance(result, HeadOutput):
            return respond(sequence.admitted(), result, timing, self.store.encoder)
        text = sequence.text
        return Response(
            tenant=sequence.request.tenant,
            kind="generation",
            text=None if text is None else text.text,
            token_ids=tuple(sequence.generated),
            logprobs=tuple(sequence.logprobs),
            finish_reason=str(result),
            usage=Usage(
                tokens=sequence.num_prompt,
                generated_tokens=sequence.num_generated,
                reused_tokens=sequence.num_reused,
            ),
            timing=timing,
            id=sequence.request.id,
        )
