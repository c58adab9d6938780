"""From what a head gave to the response that a caller reads."""

from __future__ import annotations

from typing import Any

import torch

from hmi_engine.models.tokenization import TextEncoder
from hmi_engine.pipeline.admission import AdmittedRequest
from hmi_engine.pipeline.read_out import HeadOutput
from hmi_engine.request import Response, Tag, Timing, Usage

__all__ = ["respond"]


def respond(admitted: AdmittedRequest, output: HeadOutput, timing: Timing, encoder: TextEncoder) -> Response:
    """The response to a request from its head's output; ``encoder`` is what its text went through."""
    encoded = admitted.encoded
    return Response(
        tenant=admitted.request.tenant,
        kind=output.kind,
        usage=Usage(tokens=len(encoded.input_ids), truncated=encoded.truncated),
        timing=timing,
        id=admitted.request.id,
        **_content(admitted, output, encoder),
    )


def _content(admitted: AdmittedRequest, output: HeadOutput, encoder: TextEncoder) -> dict[str, Any]:
    if output.kind == "embedding":
        return {"embedding": output.values.numpy()}
    if output.kind == "token_classification":
        words, text = admitted.encoded.words, admitted.request.text
        if not words and text is not None:  # admitted for a tenant without tags, which was replaced meanwhile
            words = encoder.encode([text], words=True)[0].words
        return {"tags": _tags(words, output)}
    scores = dict(zip(output.labels, output.values.tolist(), strict=True))
    if output.kind == "regression":
        return {"scores": scores}
    label = None if output.multi_label else output.labels[int(output.values.argmax())]
    return {"label": label, "scores": scores}


def _tags(words: tuple[tuple[int, int, int], ...], output: HeadOutput) -> tuple[Tag, ...]:
    """One tag per word, read at the word's first token."""
    firsts = torch.tensor([first for first, _, _ in words], dtype=torch.int64)
    best, labels = output.values[firsts].max(dim=-1)
    return tuple(
        Tag(start, end, output.labels[label], score)
        for (_, start, end), label, score in zip(words, labels.tolist(), best.tolist(), strict=True)
    )
