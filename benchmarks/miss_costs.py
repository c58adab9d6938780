"""What a missing window costs, in tokens of the plain model, and what each way of saving takes off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from benchmarks.result import Case, Quantity, Ratio, System
from hmi_engine.demo.timing import interleave
from hmi_engine.memory.missing_windows import find_missing
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.bert_layer import BertEmbeddings, BertLayer
from hmi_engine.models.bert_loading import BertConfiguration
from hmi_engine.models.packing import PackedSequences, window_tokens
from hmi_engine.models.windows import WindowLayers
from hmi_engine.store import Store

__all__ = ["SEQUENCE_TOKENS", "floor_in_tokens", "miss_cases", "sixty_four_token_sequences"]

SEQUENCE_TOKENS = 64
PLAIN = "plain layers, a token"
AS_TEXTS, BY_SLOT, LOOKED_UP = "as texts of their own", "attention by slot", "first projections looked up"
ONCE, KEPT = "each window once in a batch", "windows kept for later batches"
_DESCRIPTIONS = {
    PLAIN: "the domain layers over sequences of 64 tokens",
    AS_TEXTS: "each window a packed sequence through the same layers",
    BY_SLOT: "attention as products of slots instead of tiny matrices",
    LOOKED_UP: "and queries, keys, values of layer 0 by (token, slot)",
    ONCE: "and windows that a batch has often computed once",
    KEPT: "and those of earlier batches found in the overlay",
}
_Systems = dict[str, Callable[[int], object]]


@dataclass(frozen=True)
class _Batch:
    """A batch and its windows without a row, one for each occurrence: int32 [P, W], -1 where absent."""

    sequences: PackedSequences
    missing: torch.Tensor


class _ProjectedEachTime:
    """Stands in for ``TokenProjections``: projects every slot of every window."""

    def __init__(self, embed: BertEmbeddings, layer: BertLayer) -> None:
        self._embed, self._layer = embed, layer

    def look_up(self, tokens: torch.Tensor, slots: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.tensor(slots).repeat_interleave(len(tokens))
        embedded = self._embed(tokens.T.reshape(-1), positions)
        return embedded, self._layer.query_key_value(embedded)


def sixty_four_token_sequences(token_ids: Sequence[list[int]], batch_size: int) -> list[PackedSequences]:
    """Texts laid end to end and cut into full sequences, in batches; a rest that fills none is left out."""
    flat = [token for ids in token_ids for token in ids]
    ends = range(SEQUENCE_TOKENS, len(flat) + 1, SEQUENCE_TOKENS)
    pieces = [flat[end - SEQUENCE_TOKENS : end] for end in ends]
    return [
        PackedSequences.pack(pieces[start : start + batch_size])
        for start in range(0, len(pieces) - len(pieces) % batch_size or len(pieces), batch_size)
    ]


def floor_in_tokens(configuration: BertConfiguration, window: int, plot_layers: int) -> float:
    """Multiplications of a window, layer 0's projections looked up, over those of a token of the plain model.

    Linear layers and attention only: what remains is cheap beside them.
    """
    hidden, inner = configuration.hidden_size, configuration.intermediate_size
    linear = 4 * hidden**2 + 2 * hidden * inner
    token = plot_layers * (linear + 2 * SEQUENCE_TOKENS * hidden)
    of_window = window * (plot_layers * (linear + 2 * window * hidden) - 3 * hidden**2)
    return of_window / token


def miss_cases(
    store: Store, domain: str, sequences: Sequence[PackedSequences], repetitions: int
) -> tuple[list[Case], list[Quantity]]:
    """Costs per distinct window, and per missed occurrence in the order of the traffic."""
    plots = PlotLibrary(store.layout, store.catalog, store.general, overlay_bytes=0)
    batches = [_find(store, plots, domain, each) for each in sequences]
    occurrences = torch.cat([batch.missing for batch in batches])
    distinct = torch.unique(occurrences, dim=0)
    general = store.general
    cases = [
        _case(
            f"a distinct missing window of {general.window} tokens",
            _per_window(store, batches, [distinct]),
            len(distinct),
            batches,
            repetitions,
        ),
        _case(
            f"a missed occurrence of a window of {general.window} tokens",
            _per_window(store, batches, [batch.missing for batch in batches])
            | _per_batch(store, plots, domain, batches),
            len(occurrences),
            batches,
            repetitions,
        ),
    ]
    plots.close()
    window = f"window {general.window}"
    tokens = sum(batch.sequences.num_tokens for batch in batches)
    floor = floor_in_tokens(store.model.configuration, general.window, general.plot_layers)
    quantities = [
        Quantity(name=f"{window}: windows without a row", value=len(occurrences) / tokens, unit="share"),
        Quantity(
            name=f"{window}: distinct among them",
            value=len(distinct) / max(1, len(occurrences)),
            unit="share",
        ),
        Quantity(
            name=f"{window}: multiplications of a distinct window, in those of a plain token",
            value=floor,
            unit="tokens",
        ),
    ]
    return cases, quantities


def _find(store: Store, plots: PlotLibrary, domain: str, sequences: PackedSequences) -> _Batch:
    domains, window = [domain] * sequences.num_sequences, store.general.window
    with plots.reading([domain]) as view:
        references = view.lookup(sequences, domains)
    missing = find_missing(sequences, references, [""] * len(domains), window=window)
    positions = missing[0].positions if missing else torch.empty(0, dtype=torch.int64)
    return _Batch(sequences, window_tokens(sequences, window)[positions, :window])


def _per_window(store: Store, batches: Sequence[_Batch], windows: Sequence[torch.Tensor]) -> _Systems:
    """Systems that compute every window they are given."""
    model, plot_layers = store.model, store.general.plot_layers
    by_slot = WindowLayers(model.embed, model.layers[:plot_layers], projection_bytes=0)
    by_slot._projections = _ProjectedEachTime(model.embed, model.layers[0])  # type: ignore[assignment]

    def plain(_: int) -> None:
        for batch in batches:
            embedded = model.embed(batch.sequences.input_ids, batch.sequences.positions())
            model.run_layers(embedded, batch.sequences, first=0, last=plot_layers)

    def each(run: Callable[[torch.Tensor], object]) -> Callable[[int], object]:
        return lambda _: [run(tokens) for tokens in windows]

    return {
        PLAIN: plain,
        AS_TEXTS: each(lambda tokens: _run_as_texts(model, tokens, plot_layers)),
        BY_SLOT: each(by_slot),
        LOOKED_UP: each(model.window_states),
    }


def _run_as_texts(model: HierarchicalBert, tokens: torch.Tensor, plot_layers: int) -> None:
    present = tokens >= 0
    lengths = present.sum(1).tolist()
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int64)
    sequences = PackedSequences(tokens[present], offsets, tuple(lengths))
    slots = torch.arange(tokens.shape[1]).expand_as(tokens)[present]
    model.run_layers(model.embed(sequences.input_ids, slots), sequences, first=0, last=plot_layers)


def _per_batch(store: Store, plots: PlotLibrary, domain: str, batches: Sequence[_Batch]) -> _Systems:
    """Systems that search and compute as an engine does; the second keeps what it computed."""

    def complete(library: PlotLibrary) -> None:
        for batch in batches:
            domains = [domain] * batch.sequences.num_sequences
            with library.reading([domain]) as view:
                references = view.lookup(batch.sequences, domains)
                view.compute_misses(store.model, batch.sequences, domains, references)

    def kept(_: int) -> None:
        library = PlotLibrary(store.layout, store.catalog, store.general)
        complete(library)
        library.close()

    return {ONCE: lambda _: complete(plots), KEPT: kept}


@torch.no_grad()
def _case(
    name: str, systems: _Systems, num_windows: int, batches: Sequence[_Batch], repetitions: int
) -> Case:
    seconds = interleave(systems, repetitions)
    tokens = sum(batch.sequences.num_tokens for batch in batches)
    measured = {
        system: System.of(
            system,
            _DESCRIPTIONS[system],
            seconds[system],
            [tokens if system == PLAIN else num_windows] * repetitions,
            "tokens or windows",
        )
        for system in systems
    }
    return Case(
        name=name,
        settings={"tokens": tokens, "windows": num_windows, "sequence_tokens": SEQUENCE_TOKENS},
        systems=tuple(measured.values()),
        # Tokens a second over windows a second: how many tokens a window costs.
        ratios=tuple(Ratio.of(measured[PLAIN], measured[system]) for system in systems if system != PLAIN),
    )
