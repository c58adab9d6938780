"""How much the demo does, in full and with ``--quick``."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "DemoSettings"]


@dataclass(frozen=True)
class DemoSettings:
    """Sizes that decide how long the demo takes.

    Attributes:
        num_topics: topics of the documentation, two tenants each.
        background_words: unlabelled words for the table of the topics' parent.
        parent_plot_bytes: budget of the parent's table.
        domain_plot_bytes: budget of each other domain's table.
        max_train: training texts of a tenant.
        max_test: held-out texts of a tenant.
        max_epochs: most passes of a training.
        num_random_tenants: tenants with random weights, of the trained ones' shapes.
        num_stream_tenants: tenants in the measured stream, which is the size of its batches.
        repetitions: timed repetitions.
        batches: batches in a repetition.
        warm_traffic_batches: batches that the exact engine sees before, as the domains' earlier traffic.
        rank: of the tenants' LoRA.
        max_tokens: longer texts are cut.
    """

    num_topics: int
    background_words: int
    parent_plot_bytes: int
    domain_plot_bytes: int
    max_train: int
    max_test: int
    max_epochs: int
    num_random_tenants: int
    num_stream_tenants: int
    repetitions: int
    batches: int
    warm_traffic_batches: int
    rank: int = 16
    max_tokens: int = 64


FULL = DemoSettings(
    num_topics=4,
    background_words=300_000,
    parent_plot_bytes=96 << 20,
    domain_plot_bytes=16 << 20,
    max_train=800,
    max_test=300,
    max_epochs=3,
    num_random_tenants=300,
    num_stream_tenants=32,
    repetitions=7,
    batches=3,
    warm_traffic_batches=12,
)

QUICK = DemoSettings(
    num_topics=2,
    background_words=0,
    parent_plot_bytes=16 << 20,
    domain_plot_bytes=4 << 20,
    max_train=600,
    max_test=150,
    max_epochs=3,
    num_random_tenants=200,
    num_stream_tenants=32,
    repetitions=3,
    batches=1,
    warm_traffic_batches=4,
)
