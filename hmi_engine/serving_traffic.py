"""How an engine has its domains learn from what they are asked for."""

from __future__ import annotations

from hmi_engine.errors import ReadOnlyStoreError
from hmi_engine.pipeline.domain_updates import DomainUpdater
from hmi_engine.pipeline.traffic_saver import TrafficSaver
from hmi_engine.serving_options import EngineOptions
from hmi_engine.store import Store

__all__ = ["open_traffic", "records_traffic", "start_updates"]


def records_traffic(store: Store, options: EngineOptions) -> bool:
    """Whether an engine counts the n-grams that it is asked for."""
    return bool(store.general.plot_layers) and options.record_traffic and not store.catalog.read_only


def open_traffic(store: Store, options: EngineOptions) -> TrafficSaver | None:
    """What counts and saves them; None where nothing is counted."""
    if not records_traffic(store, options):
        return None
    return TrafficSaver(store, max_bytes=options.traffic_memory, interval_seconds=options.traffic_interval)


def start_updates(store: Store, options: EngineOptions, traffic: TrafficSaver | None) -> DomainUpdater | None:
    """The thread that takes them into the tables; None where the options ask for none.

    Raises:
        ReadOnlyStoreError: the store is not open for writing.
    """
    if options.update_domains_every is None:
        return None
    if store.catalog.read_only:
        raise ReadOnlyStoreError(
            f"{store.layout.root} was opened with read_only=True, so its domains cannot be updated; "
            "open it for writing or leave update_domains_every out"
        )
    return DomainUpdater(
        store,
        every=options.update_domains_every,
        max_share=options.update_share,
        # Without own counts there may still be those of other processes' engines.
        flush=traffic.save if traffic is not None else lambda: None,
    )
