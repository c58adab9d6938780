"""The mathematics of hBERT, written once more from transformers' own BertModel: an independent oracle."""

import torch
from transformers import BertModel

PLACEHOLDER = 4
"""[MASK] of the tests' vocabulary."""


def run_window(model: BertModel, tokens: list[int | None], plot_layers: int) -> dict[int, torch.Tensor]:
    """One window alone through embeddings and layers 0..K-1; {slot: hidden state} of its present slots."""
    slots = [slot for slot, token in enumerate(tokens) if token is not None]
    ids = torch.tensor([[tokens[slot] for slot in slots]])
    output = model(
        input_ids=ids,
        position_ids=torch.tensor([slots]),
        token_type_ids=torch.zeros_like(ids),
        output_hidden_states=True,
    )
    return dict(zip(slots, output.hidden_states[plot_layers][0], strict=True))


def merged(model: BertModel, ids: list[int], plot_layers: int, window: int) -> torch.Tensor:
    """Input of layer K for one sequence, float32 [n, H], every window computed (nothing missing)."""
    rows = []
    for t in range(len(ids)):
        if window == 2:
            alone = run_window(model, [ids[t], None], plot_layers)[0]
            total = alone.clone()
            if t > 0:
                total += run_window(model, [ids[t - 1], ids[t]], plot_layers)[1] - alone
            if t < len(ids) - 1:
                total += run_window(model, [ids[t], ids[t + 1]], plot_layers)[0] - alone
        else:
            total = run_trigram(model, _trigram(ids, t), plot_layers)[1].clone()
            if t > 0:
                total += run_trigram(model, _trigram(ids, t - 1), plot_layers)[2]
            if t < len(ids) - 1:
                total += run_trigram(model, _trigram(ids, t + 1), plot_layers)[0]
        rows.append(total)
    positions = model.embeddings.position_embeddings.weight[: len(ids)]
    return torch.nn.functional.layer_norm(
        torch.stack(rows) + positions, (model.config.hidden_size,), eps=1e-5
    )


def _trigram(ids: list[int], t: int) -> list[int | None]:
    return [ids[p] if 0 <= p < len(ids) else None for p in (t - 1, t, t + 1)]


def run_trigram(model: BertModel, tokens: list[int | None], plot_layers: int) -> dict[int, torch.Tensor]:
    """Three places, of which those without a known token hold [MASK]."""
    return run_window(model, [PLACEHOLDER if token is None else token for token in tokens], plot_layers)


def backed_off(
    model: BertModel,
    ids: list[int],
    plot_layers: int,
    window: int,
    has: "callable",
    merge: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Input of layer K where only windows for which ``has(tokens)`` is true are in the table.

    ``merge`` is that of a distilled model; by default the undistilled one.
    """
    count, size = len(ids), model.config.hidden_size

    def pair(t: int) -> dict[int, torch.Tensor]:
        """What bigram (t, t+1) tells of its tokens for window=2: each beside [MASK] where it is missing."""
        if has([ids[t], ids[t + 1]]):
            return run_window(model, [ids[t], ids[t + 1]], plot_layers)
        return {
            0: run_window(model, [ids[t], PLACEHOLDER], plot_layers)[0],
            1: run_window(model, [PLACEHOLDER, ids[t + 1]], plot_layers)[1],
        }

    def single(t: int, number: int) -> torch.Tensor:
        """A token at a slot of a trigram window of which nothing else is known."""
        tokens = [ids[t] if place == number else None for place in range(3)]
        return run_trigram(model, tokens, plot_layers)[number]

    def slot(t: int, number: int) -> torch.Tensor:
        """R(g_t)[number] for window=3, composed where the trigram is missing."""
        tokens = _trigram(ids, t)
        if has(tokens):
            return run_trigram(model, tokens, plot_layers)[number]
        left, right = [tokens[0], tokens[1], None], [None, tokens[1], tokens[2]]
        has_left = tokens[0] is not None and has(left)
        has_right = tokens[2] is not None and has(right)
        if number == 0:
            return run_trigram(model, left, plot_layers)[0] if has_left else single(t - 1, 0)
        if number == 2:
            return run_trigram(model, right, plot_layers)[2] if has_right else single(t + 1, 2)
        alone = single(t, 1)
        first = run_trigram(model, left, plot_layers)[1] if has_left else alone
        second = run_trigram(model, right, plot_layers)[1] if has_right else alone
        return first + second - alone

    rows = []
    for t in range(count):
        if window == 2:
            alone = run_window(model, [ids[t], None], plot_layers)[0]
            total = alone.clone()
            total += pair(t - 1)[1] - alone if t > 0 else 0
            total += pair(t)[0] - alone if t < count - 1 else 0
        else:
            total = slot(t, 1).clone()
            total += slot(t - 1, 2) if t > 0 else 0
            total += slot(t + 1, 0) if t < count - 1 else 0
        rows.append(total)
    if merge is None:
        merge = {"position_embeddings": model.embeddings.position_embeddings.weight}
    states = torch.stack(rows) + merge["position_embeddings"][:count]
    weight, bias = merge.get("layer_norm.weight"), merge.get("layer_norm.bias")
    return torch.nn.functional.layer_norm(states, (size,), weight, bias, eps=1e-5)


def upper_layers(model: BertModel, hidden_states: torch.Tensor, plot_layers: int) -> torch.Tensor:
    """Layers K..N-1 of transformers over one sequence [n, H]."""
    hidden_states = hidden_states[None]
    for layer in model.encoder.layer[plot_layers:]:
        output = layer(hidden_states)
        hidden_states = output[0] if isinstance(output, tuple) else output
    return hidden_states[0]
