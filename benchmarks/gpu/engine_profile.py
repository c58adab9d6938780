"""Where does an engine on this GPU spend its time? ``python -m benchmarks.gpu.engine_profile`` prints it.

For an encoder of BERT-base's shape and 32 tenants: throughput and stages by pipeline depth and batch size,
with and without CUDA graphs, torch's profile of the host and of the device without them, and the layers of a
batch alone: launched one by one, and as one graph. ``--dry`` runs what a CPU can of it. Nothing is written.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.random_base import write_random_base
from benchmarks.gpu.serving_suite import DRY, FULL, PREFIX, open_store, request_rounds
from hmi_engine.demo.timing import median
from hmi_engine.engine import Engine
from hmi_engine.errors import HmiError
from hmi_engine.pipeline.device_compute import DeviceCompute
from hmi_engine.pipeline.step import BatchItem
from hmi_engine.request import Request
from hmi_engine.serving_core import ServingCore
from hmi_engine.store import Store

__all__ = ["main"]

PLANS = (
    {"pipeline_depth": 1},
    {"pipeline_depth": 2},
    {"pipeline_depth": 3, "max_batch_tokens": 2048},
    {"pipeline_depth": 3, "max_batch_tokens": 2048, "device_graphs": False},
    {"pipeline_depth": 3},
    {"pipeline_depth": 3, "device_graphs": False},
    {"pipeline_depth": 3, "max_batch_tokens": 32768},
    {"pipeline_depth": 4},
)
REPETITIONS = 5
LAYER_TOKENS = (2048, 8192)


def _open(store: Store, device: str, **options: object) -> Engine:
    memory = {} if device == "cpu" else {"device_memory": "8GiB"}
    return Engine(store, device=device, record_traffic=False, **memory, **options)


def _print_throughput(store: Store, device: str, rounds: Sequence[list[Request]]) -> None:
    for plan in PLANS:
        with _open(store, device, **plan) as engine:
            for requests in rounds[:3]:
                engine.run(requests)
            before = engine.stats().stages or {}
            seconds = []
            for number in range(REPETITIONS):
                began = time.perf_counter()
                engine.run(rounds[number % len(rounds)])
                seconds.append(time.perf_counter() - began)
            after = engine.stats().stages or {}
        rate = len(rounds[0]) / median(seconds)
        busy = {
            name: round(1e3 * (of["busy_seconds"] - before[name]["busy_seconds"]) / REPETITIONS, 2)
            for name, of in after.items()
        }
        print(f"{plan}: {rate:.0f} texts/s; busy ms a call: {busy}", flush=True)


def _print_profile(engine: Engine, rounds: Sequence[list[Request]]) -> None:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for requests in rounds[:2]:
            engine.run(requests)
    for key in ("self_device_time_total", "self_cpu_time_total"):
        print(profiled.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=60), flush=True)


def _print_layers(core: ServingCore, requests: Sequence[Request]) -> None:
    """Times of a batch's layers alone, of batches of two sizes."""
    admitted = [each for each in core.admit(requests) if not isinstance(each, HmiError)]
    for limit in LAYER_TOKENS:
        items: list[BatchItem] = []
        for each in admitted:
            if sum(len(item.input_ids) for item in items) + len(each.encoded.input_ids) > limit:
                break
            items.append(BatchItem(each.tenant, each.encoded.input_ids))
        items.sort(key=lambda item: item.tenant.name)
        with core.use_backend(), torch.no_grad():
            prepared = core.runner.prepare(items)
            try:
                _print_batch(core, prepared.searched)
            finally:
                core.runner.discard(prepared)


def _print_batch(core: ServingCore, searched: object) -> None:
    computer = core.runner._computer
    assert isinstance(computer, DeviceCompute)
    sent = searched.sent  # type: ignore[attr-defined]
    layers: Callable[[], Tensor] = partial(
        computer._model.run_layers,
        sent.hidden_states,
        sent.sequences,
        first=core.store.general.plot_layers,
        adapters=sent.adapters,
        readout=sent.readout,
    )
    tokens = sent.sequences.num_tokens
    with computer._streams.on("compute"):
        print(f"layers of {tokens} tokens, one by one: {_host_and_device(layers)}")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            captured = layers()
        print(f"layers of {tokens} tokens, as a graph: {_host_and_device(graph.replay)}")
        print(f"largest difference: {(captured - layers()).abs().max().item():.2g}", flush=True)


def _host_and_device(call: Callable[[], object], count: int = 20) -> str:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        call()
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    whole = time.perf_counter() - began
    return f"the host is busy for {1e3 * host / count:.2f} ms of {1e3 * whole / count:.2f} ms"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints all of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.engine_profile", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on the CPU, what runs there")
    is_dry = parser.parse_args(argv).dry
    plan, device = (DRY, "cpu") if is_dry else (FULL, "cuda")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hmi-gpu-profile-")))
        base = write_random_base(folder / "base", is_tiny=is_dry)
        store = stack.enter_context(open_store(folder / "store", base, None, plan))
        names = [name for name in store.tenants if name.startswith(f"{PREFIX}/")]
        rounds = request_rounds(names, plan)
        _print_throughput(store, device, rounds)
        if not is_dry:
            engine = stack.enter_context(_open(store, device, pipeline_depth=3, device_graphs=False))
            engine.run(rounds[0])
            _print_profile(engine, rounds)
            assert isinstance(engine._core, ServingCore)
            _print_layers(engine._core, rounds[0])


if __name__ == "__main__":
    main()
