"""N-gram windows through the domain layers: each window alone, absent slots left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from hmi_engine.models.bert_layer import BertEmbeddings, BertLayer
from hmi_engine.models.linear import rounded_rows
from hmi_engine.models.token_projections import TokenProjections

__all__ = ["DEFAULT_PROJECTION_BYTES", "WindowLayers", "fill_places"]

DEFAULT_PROJECTION_BYTES = 64 << 20
ROWS_PER_STEP = 1536
"""Slots computed at a time: few enough that they stay in the caches, enough for fast matrix products."""


def fill_places(tokens: torch.Tensor, placeholder_token_id: int | None) -> torch.Tensor:
    """Windows int32 [M, W] with the placeholder in every place that has no token (-1).

    A token whose neighbor is unknown, or lies outside the text, stands beside ``[MASK]`` rather than alone: a
    base model never saw a lone token, and makes a state of it that is further from the true one than none
    (docs/coverage.md).

    Raises:
        ValueError: there is no placeholder, as only a store without domain layers may have none.
    """
    if placeholder_token_id is None:
        raise ValueError("windows run only in stores with domain layers, which have a placeholder token")
    return tokens.masked_fill(tokens < 0, placeholder_token_id)


class WindowLayers:
    """Domain layers over windows of up to three tokens; safe to call from many threads.

    A window of P tokens costs P tokens through the layers, less the projections of the first of them, which
    depend on a token and its slot alone and are looked up. No slot of the last layer can be left out: the
    merge reads slot s of the window that begins s places before a token, so it reads every slot.
    """

    def __init__(
        self,
        embed: BertEmbeddings,
        layers: Sequence[BertLayer],
        *,
        projection_bytes: int = DEFAULT_PROJECTION_BYTES,
    ) -> None:
        """Runs over layers 0 to K-1; keeps at most ``projection_bytes`` of the first one's projections.

        Raises:
            ValueError: there are no layers.
        """
        if not layers:
            raise ValueError("windows need at least one domain layer; plot_layers is 0")
        self._layers = tuple(layers)
        self._projections = TokenProjections(embed, layers[0], projection_bytes)
        self.hidden_size = self._projections.hidden_size

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states of windows after the domain layers.

        Args:
            tokens: int32 [M, W] token ids by slot, -1 where the slot is absent (masked out, never padded).

        Returns:
            float32 [M, W, H]; zero in absent slots.
        """
        num_windows, window = tokens.shape
        present = tokens >= 0
        if bool(present.all()):
            result = torch.empty(num_windows, window, self.hidden_size)
            self._run_slots(tokens, tuple(range(window)), result)
            return result
        result = torch.zeros(num_windows, window, self.hidden_size)
        patterns = (present << torch.arange(window)).sum(1)
        for pattern in range(1, 1 << window):
            rows = (patterns == pattern).nonzero()[:, 0]
            if rows.numel():
                slots = tuple(slot for slot in range(window) if pattern >> slot & 1)
                states = result.new_empty(rows.numel(), len(slots), self.hidden_size)
                self._run_slots(tokens[rows][:, slots], slots, states)
                result[rows[:, None], torch.tensor(slots)] = states
        return result

    def _run_slots(self, tokens: torch.Tensor, slots: tuple[int, ...], result: torch.Tensor) -> None:
        """Fills ``result`` [M, P, H] for tokens [M, P], all present, that stand at the slots [P]."""
        step = max(1, ROWS_PER_STEP // len(slots))
        for start in range(0, len(tokens), step):
            part = tokens[start : start + step]
            count, missing = len(part), rounded_rows(len(part)) - len(part)
            # More windows than there are, so that products come in few sizes.
            part = functional.pad(part, (0, 0, 0, missing))
            hidden_states, projected = self._projections.look_up(part, slots)
            for number, layer in enumerate(self._layers):
                if number:
                    projected = layer.query_key_value(hidden_states)
                hidden_states = _window_layer(layer, hidden_states, projected, len(slots))
            states = hidden_states.view(len(slots), len(part), -1)[:, :count]
            result[start : start + count] = states.transpose(0, 1)


def _window_layer(
    layer: BertLayer, hidden_states: torch.Tensor, projected: torch.Tensor, width: int
) -> torch.Tensor:
    """One layer, given its queries, keys and values [width * M, 3H]; [width * M, H] -> the same.

    Rows are ordered by slot, then by window: the rows of one slot are then one matrix.
    """
    attended = layer.attention_output(_window_attention(projected, width, layer.num_heads))
    attended = layer.attention_norm(attended.add_(hidden_states))
    output = layer.ffn_down(layer.ffn_up(attended, gelu="none"))
    return layer.ffn_norm(output.add_(attended))


def _window_attention(projected: torch.Tensor, width: int, num_heads: int) -> torch.Tensor:
    """Attention within windows: queries, keys and values [width * M, 3H] -> [width * M, H].

    For 2 or 3 tokens elementwise products are cheaper than tiny matrix products.
    """
    num_rows, hidden_size = projected.shape[0], projected.shape[1] // 3
    by_slot = projected.view(width, num_rows // width, 3, num_heads, hidden_size // num_heads)
    queries, keys, values = by_slot.unbind(2)
    if width == 1:
        return values.reshape(num_rows, hidden_size)
    context = torch.empty(queries.shape)
    attend = _attend_to_two if width == 2 else _attend
    attend(queries, keys, values, context)
    return context.view(num_rows, hidden_size)


def _attend_to_two(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, context: torch.Tensor
) -> None:
    """All [2, M, heads, d]; the softmax over two is the sigmoid of their difference: half of the products."""
    scale = queries.shape[-1] ** -0.5
    key_change, value_change = keys[0] - keys[1], values[0] - values[1]
    for query, output in zip(queries, context, strict=True):
        weights = (query * key_change).sum(-1, keepdim=True).mul_(scale).sigmoid_()
        torch.addcmul(values[1], weights, value_change, out=output)


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, context: torch.Tensor) -> None:
    """All [W, M, heads, d]; fills ``context``."""
    scale = queries.shape[-1] ** -0.5
    for query, output in zip(queries, context, strict=True):
        scores = torch.stack([(query * key).sum(-1, keepdim=True) for key in keys])
        weights = scores.mul_(scale).softmax(0)
        torch.mul(weights[0], values[0], out=output)
        for weight, value in zip(weights[1:], values[1:], strict=True):
            output.addcmul_(weight, value)
