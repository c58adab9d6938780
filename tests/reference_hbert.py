"""The mathematics of hBERT, written once more from transformers' own BertModel: an independent oracle."""

import torch
from transformers import BertModel


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
            total = run_window(model, _trigram(ids, t), plot_layers)[1].clone()
            if t > 0:
                total += run_window(model, _trigram(ids, t - 1), plot_layers)[2]
            if t < len(ids) - 1:
                total += run_window(model, _trigram(ids, t + 1), plot_layers)[0]
        rows.append(total)
    positions = model.embeddings.position_embeddings.weight[: len(ids)]
    return torch.nn.functional.layer_norm(
        torch.stack(rows) + positions, (model.config.hidden_size,), eps=1e-5
    )


def _trigram(ids: list[int], t: int) -> list[int | None]:
    return [ids[p] if 0 <= p < len(ids) else None for p in (t - 1, t, t + 1)]


def backed_off(
    model: BertModel, ids: list[int], plot_layers: int, window: int, has: "callable"
) -> torch.Tensor:
    """Input of layer K where only windows for which ``has(tokens)`` is true are in the table."""
    count, size = len(ids), model.config.hidden_size

    def unigram(t: int) -> torch.Tensor:
        tokens = [ids[t], None] if window == 2 else [None, ids[t], None]
        return run_window(model, tokens, plot_layers)[window - 2]

    def pair(t: int) -> dict[int, torch.Tensor] | None:
        """Bigram (t, t+1) for window=2."""
        tokens = [ids[t], ids[t + 1]]
        return run_window(model, tokens, plot_layers) if has(tokens) else None

    def slot(t: int, number: int) -> torch.Tensor:
        """R(g_t)[number] for window=3, composed where the trigram is missing."""
        tokens = _trigram(ids, t)
        if has(tokens):
            return run_window(model, tokens, plot_layers)[number]
        left, right = [tokens[0], tokens[1], None], [None, tokens[1], tokens[2]]
        has_left = tokens[0] is not None and has(left)
        has_right = tokens[2] is not None and has(right)
        if number == 0:
            return run_window(model, left, plot_layers)[0] if has_left else torch.zeros(size)
        if number == 2:
            return run_window(model, right, plot_layers)[2] if has_right else torch.zeros(size)
        alone = unigram(t)
        first = run_window(model, left, plot_layers)[1] if has_left else alone
        second = run_window(model, right, plot_layers)[1] if has_right else alone
        return first + second - alone

    rows = []
    for t in range(count):
        if window == 2:
            alone = unigram(t)
            before = pair(t - 1) if t > 0 else None
            after = pair(t) if t < count - 1 else None
            total = alone.clone()
            total += before[1] - alone if before else 0
            total += after[0] - alone if after else 0
        else:
            total = slot(t, 1).clone()
            total += slot(t - 1, 2) if t > 0 else 0
            total += slot(t + 1, 0) if t < count - 1 else 0
        rows.append(total)
    positions = model.embeddings.position_embeddings.weight[:count]
    return torch.nn.functional.layer_norm(torch.stack(rows) + positions, (size,), eps=1e-5)


def upper_layers(model: BertModel, hidden_states: torch.Tensor, plot_layers: int) -> torch.Tensor:
    """Layers K..N-1 of transformers over one sequence [n, H]."""
    hidden_states = hidden_states[None]
    for layer in model.encoder.layer[plot_layers:]:
        output = layer(hidden_states)
        hidden_states = output[0] if isinstance(output, tuple) else output
    return hidden_states[0]
