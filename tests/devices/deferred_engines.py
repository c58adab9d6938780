"""What tests of engines on deferred streams share: memory, what was allocated, a mistake."""

from __future__ import annotations

from hmi_engine.memory.arena import AdapterArena
from hmi_engine.memory.streams import Arrival
from hmi_engine.pipeline.device_buffers import StagedBuffer

__all__ = ["forget_layers", "memory_for", "note_reservations"]


def memory_for(store, share):
    """A device budget whose arena holds this share of all tenants."""
    return 2 * int(share * sum(AdapterArena.allocated_bytes(t.bytes // 4) for t in store.tenants.values()))


def note_reservations(monkeypatch):
    """A list that grows with each buffer that is asked for memory: whether it stayed where it was."""
    reserve, reserved = StagedBuffer._reserve, []

    def noting(buffer, num_bytes):
        before = buffer._device.data_ptr()
        reserve(buffer, num_bytes)
        reserved.append(buffer._device.data_ptr() == before)

    monkeypatch.setattr(StagedBuffer, "_reserve", noting)
    return reserved


def forget_layers(monkeypatch):
    """Layers do not wait for their adapters."""
    monkeypatch.setattr(Arrival, "before_layer", lambda arrival, index: None)
