"""The options of an engine, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hmi_engine.memory.device_choice import DEVICE_NAMES, is_device_name
from hmi_engine.memory.memory_budget import MemoryBudget
from hmi_engine.memory.tenant_reader import DEFAULT_READ_TIMEOUT
from hmi_engine.memory.traffic import DEFAULT_TRAFFIC_BYTES
from hmi_engine.pipeline.step import MissPolicy

__all__ = ["DTYPES", "MAX_PIPELINE_DEPTH", "EngineOptions", "PrefixCache"]

PrefixCache = Literal["shared", "tenant", "off"]

DTYPES = ("float32", "float16", "bfloat16")
"""Names of what an engine may compute in, beside ``"auto"``."""

MAX_PIPELINE_DEPTH = 8
"""More gains nothing that a machine could compute with, and memory is shared by the batches in flight."""


@dataclass(frozen=True)
class EngineOptions:
    """How an engine serves: the keyword arguments of :class:`~hmi_engine.Engine`.

    Attributes:
        device: ``"cpu"``, ``"cuda"`` (torch's current GPU), ``"cuda:1"``, or ``"auto"``: the GPU, if there is
            one that can be used.
        backend: kernels: ``"auto"``, ``"cpu"`` (on the CPU) or ``"reference"`` (plain torch, slow).
        dtype: what a GPU computes in and holds adapters in: ``"float32"``, ``"float16"``, ``"bfloat16"``, or
            ``"auto"``: bfloat16 where the GPU has it, else float16. The CPU computes in float32; with
            ``"bfloat16"`` products with the base's upper layers are in it, where the processor multiplies it
            (AVX512-BF16, AMX), and all between them, adapters, keys and values stay float32. Heads are
            float32 everywhere.
        device_memory: budget for adapters where the device computes with them, in bytes or as ``"512MiB"``,
            before which ``host_memory`` is a second tier. ``"auto"`` on the CPU: there is one tier, of
            ``host_memory``. On a GPU half of it is for PLOT tables, and ``"auto"`` is half of what is free.
        host_memory: budget for adapters in host memory, in bytes or as ``"2GiB"``.
        memory: what the engines of this process share, of which this one reserves its host memory: the
            budgets for adapters, overlay, counts of traffic, keys and values. None: it shares nothing.
        miss: ``"backoff"`` composes a missing window from shorter n-grams, ``"exact"`` computes it,
            ``"budget"`` computes those that a batch has most often, of equals those that corpora and recorded
            traffic have most often, and composes the others.
        exact_budget: ``miss="budget"``: most windows computed per token of a batch, 0 to 1.
        max_batch_tokens: most tokens computed at once.
        pipeline_depth: most batches in flight: while one is computed, the adapters of those after it are
            read and their n-grams searched. 1 does one thing after another; a GPU wants 3, so that it has its
            next batch when it ends one.
        read_timeout: seconds after which a read that has not ended fails the requests that need it.
        overlay_memory: budget for the rows of windows computed in traffic, which later batches find.
        record_traffic: whether to count the n-grams that requests ask for and to keep them in the store for
            ``Store.update_domain``. A store opened with ``read_only=True`` records nothing.
        traffic_memory: budget for these counts.
        traffic_interval: seconds between two savings of them; the rest is saved when the engine is closed.
        update_domains_every: seconds between two rounds of updates of the domains that had traffic, on a
            thread of the engine; None for no updates. Each writes the domain's table anew, so minutes to
            hours suit large ones.
        update_share: most of its time that this thread works, 0 to 1.
        cache_memory: a decoder's budget for keys and values where it computes, in bytes or as ``"1GiB"``; on
            a GPU it comes beside ``device_memory``.
        block_tokens: tokens of a block of it.
        max_step_tokens: most tokens of a decoder's step: one of each text under way, and pieces of prompts.
            Larger takes prompts in faster, smaller keeps texts going evenly.
        max_running: most texts and prompts under way at a time.
        prefix_cache: whether a prompt begins with the keys and values of an earlier one that began alike:
            ``"shared"`` (between all whose weights are equal), ``"tenant"`` (only of the same tenant: then no
            tenant can learn from an answer's time what another one was asked), or ``"off"``.
        shared_prefix_memory: ``prefix_cache="shared"``: budget for what prompts that begin alike have in
            common below the first layer that a tenant adapts, where tenants do not adapt all; beside
            ``cache_memory``, and where that is. 0: such tenants share nothing.
        device_graphs: whether a GPU is told of an encoder's layers, and of a decoder's steps once they are
            one token for each text, by CUDA graphs. They are captured as batches of new sizes come, and take
            memory for each of a few sizes.
        trace: file for a trace of all stages and layers, written when the engine is closed; Perfetto
            (ui.perfetto.dev) and chrome://tracing show it.

    Raises:
        ValueError: an option is none of those above, or out of range.
    """

    device: str = "auto"
    backend: str = "auto"
    dtype: str = "auto"
    device_memory: int | str = "auto"
    host_memory: int | str = "2GiB"
    memory: MemoryBudget | None = None
    miss: MissPolicy = "backoff"
    exact_budget: float = 0.05
    max_batch_tokens: int = 8192
    pipeline_depth: int = 2
    read_timeout: float = DEFAULT_READ_TIMEOUT
    overlay_memory: int | str = "256MiB"
    record_traffic: bool = True
    traffic_memory: int | str = DEFAULT_TRAFFIC_BYTES
    traffic_interval: float = 60.0
    update_domains_every: float | None = None
    update_share: float = 0.25
    cache_memory: int | str = "1GiB"
    block_tokens: int = 16
    max_step_tokens: int = 512
    max_running: int = 256
    prefix_cache: PrefixCache = "shared"
    shared_prefix_memory: int | str = "64MiB"
    device_graphs: bool = True
    trace: str | Path | None = None

    def __post_init__(self) -> None:
        """Checks what can be checked without a store."""
        if not is_device_name(self.device):
            raise ValueError(f"device is {self.device!r}; this release knows {DEVICE_NAMES}")
        _check_option("backend", self.backend, ("auto", "cpu", "reference"))
        _check_option("dtype", self.dtype, ("auto", *DTYPES))
        _check_option("miss", self.miss, ("backoff", "exact", "budget"))
        if not 0 <= self.exact_budget <= 1:
            raise ValueError(f"exact_budget is {self.exact_budget}, must be 0 to 1 windows per token")
        if self.max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {self.max_batch_tokens}, must be at least 1")
        if not 1 <= self.pipeline_depth <= MAX_PIPELINE_DEPTH:
            raise ValueError(f"pipeline_depth is {self.pipeline_depth}, must be 1 to {MAX_PIPELINE_DEPTH}")
        for name in ("block_tokens", "max_step_tokens", "max_running"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        _check_option("prefix_cache", self.prefix_cache, ("shared", "tenant", "off"))
        if self.read_timeout <= 0:
            raise ValueError(f"read_timeout is {self.read_timeout}, must be above 0 seconds")


def _check_option(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; this release knows {', '.join(map(repr, allowed))}")
