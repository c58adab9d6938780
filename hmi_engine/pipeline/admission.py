"""Checks requests, finds their tenants and turns texts into token ids, before anything is queued."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hmi_engine.errors import HmiError, InvalidRequestError, TextTooLongError
from hmi_engine.knowledge.catalog_views import TenantView
from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.models.tokenization import EncodedText, TextEncoder
from hmi_engine.request import Request

__all__ = ["AdmittedRequest", "admit"]


@dataclass(frozen=True)
class AdmittedRequest:
    """A request that is ready for a batch."""

    request: Request
    tenant: TenantInfo
    encoded: EncodedText


def admit(
    requests: Sequence[Request], tenants: TenantView, encoder: TextEncoder, *, vocab_size: int
) -> list[AdmittedRequest | HmiError]:
    """Admits requests one by one: in their order, each admitted or the error that its response will carry.

    Args:
        requests: as they came.
        tenants: of the store.
        encoder: of the store's base.
        vocab_size: of the base's embeddings, which a tokenizer with tokens added to it can exceed.
    """
    results = _find_tenants(requests, tenants)
    encoded = _encode(requests, results, encoder)
    return [
        result
        if isinstance(result, HmiError)
        else _admitted(request, result, encoded.get(index), encoder, vocab_size)
        for index, (request, result) in enumerate(zip(requests, results, strict=True))
    ]


def _refusal(error: Exception) -> HmiError:
    """What the response of a request carries that could not be read; whatever was thrown is its own fault."""
    if isinstance(error, HmiError):
        return error
    return InvalidRequestError(f"the request cannot be read: {type(error).__name__}: {error}")


def _find_tenants(requests: Sequence[Request], tenants: TenantView) -> list[TenantInfo | HmiError]:
    """Checks all requests and finds their tenants, all in one look at the catalog."""
    results: list[str | HmiError] = []
    for request in requests:
        try:
            request.check()
            results.append(request.tenant)
        except Exception as error:  # no InvalidRequestError: say, an integer that is too long to be told of
            results.append(_refusal(error))
    found: dict[str, TenantInfo | HmiError] = {}
    found.update(tenants.find(name for name in results if isinstance(name, str)))
    for name in results:
        if isinstance(name, str) and name not in found:
            found[name] = _missing(name, tenants)
    return [found[result] if isinstance(result, str) else result for result in results]


def _missing(name: str, tenants: TenantView) -> TenantInfo | HmiError:
    try:
        return tenants[name]
    except HmiError as error:
        return error


def _encode(
    requests: Sequence[Request], results: Sequence[TenantInfo | HmiError], encoder: TextEncoder
) -> dict[int, EncodedText | HmiError]:
    """Encodes all texts of one call together, so that the tokenizer's threads share them."""
    texts: dict[bool, dict[int, str]] = {False: {}, True: {}}
    for index, (request, result) in enumerate(zip(requests, results, strict=True)):
        if isinstance(result, TenantInfo) and request.text is not None:
            texts[result.head_kind == "token_classification"][index] = request.text
    encoded: dict[int, EncodedText | HmiError] = {}
    for words, chosen in texts.items():
        if chosen:
            encoded.update(zip(chosen, _encode_texts(list(chosen.values()), encoder, words), strict=True))
    return encoded


def _encode_texts(
    texts: list[str], encoder: TextEncoder, words: bool
) -> Sequence[EncodedText | InvalidRequestError]:
    """Encodes all texts, or each alone where that fails: the tokenizer throws for all of a list at once."""
    try:
        return encoder.encode(texts, words=words)
    except Exception as error:
        if len(texts) == 1:
            return [InvalidRequestError(f"the tokenizer cannot read the text: {error}; send another one")]
    return [_encode_texts([text], encoder, words)[0] for text in texts]


def _admitted(
    request: Request,
    tenant: TenantInfo,
    encoded: EncodedText | HmiError | None,
    encoder: TextEncoder,
    vocab_size: int,
) -> AdmittedRequest | HmiError:
    if encoded is None:
        try:
            encoded = _checked_ids(request.input_ids, encoder, vocab_size)
        except Exception as error:
            encoded = _refusal(error)
    if isinstance(encoded, HmiError):
        return encoded
    largest = max(encoded.input_ids, default=0)
    if largest >= vocab_size:
        return InvalidRequestError(
            f"the text has token {largest}, but the model knows {vocab_size} tokens, fewer than its "
            "tokenizer; leave out what becomes that token"
        )
    if encoded.truncated and request.long_text == "error":
        return TextTooLongError(
            f"the text has more than the model's {encoder.max_tokens} tokens; shorten it, or send it with "
            "long_text='truncate'"
        )
    return AdmittedRequest(request, tenant, encoded)


def _checked_ids(input_ids: Any, encoder: TextEncoder, vocab_size: int) -> EncodedText:
    given = input_ids.tolist() if hasattr(input_ids, "tolist") else list(input_ids)
    ids = [_integer(token) for token in given]
    num_tokens = min(encoder.vocab_size, vocab_size)
    for position, token in enumerate(ids):
        if not 0 <= token < num_tokens:
            raise InvalidRequestError(
                f"input_ids[{position}] is {given[position]!r:.80}; token ids are integers from 0 to "
                f"{num_tokens - 1}"
            )
    kept = ids[: encoder.max_tokens]
    words = tuple((index, index, index + 1) for index in range(len(kept)))
    return EncodedText(kept, truncated=len(kept) < len(ids), words=words)


def _integer(token: Any) -> int:
    """The integer that ``token`` is, of Python's own type or another library's; -1 where it is none."""
    if isinstance(token, bool):
        return -1
    try:
        return operator.index(token)
    except TypeError:
        return -1
