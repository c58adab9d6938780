"""Checks requests, finds their tenants and turns texts into token ids, before anything is queued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    requests: Sequence[Request], tenants: TenantView, encoder: TextEncoder
) -> list[AdmittedRequest | HmiError]:
    """Admits requests one by one: in their order, each admitted or the error that its response will carry."""
    results = _find_tenants(requests, tenants)
    encoded = _encode(requests, results, encoder)
    return [
        result if isinstance(result, HmiError) else _admitted(request, result, encoded.get(index), encoder)
        for index, (request, result) in enumerate(zip(requests, results, strict=True))
    ]


def _find_tenants(requests: Sequence[Request], tenants: TenantView) -> list[TenantInfo | HmiError]:
    """Checks all requests and finds their tenants, all in one look at the catalog."""
    results: list[str | HmiError] = []
    for request in requests:
        try:
            request.check()
            results.append(request.tenant)
        except InvalidRequestError as error:
            results.append(error)
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
) -> dict[int, EncodedText]:
    """Encodes all texts of one call together, so that the tokenizer's threads share them."""
    texts: dict[bool, list[int]] = {False: [], True: []}
    for index, (request, result) in enumerate(zip(requests, results, strict=True)):
        if isinstance(result, TenantInfo) and request.text is not None:
            texts[result.head_kind == "token_classification"].append(index)
    encoded: dict[int, EncodedText] = {}
    for words, indexes in texts.items():
        if indexes:
            batch = encoder.encode([requests[index].text or "" for index in indexes], words=words)
            encoded.update(zip(indexes, batch, strict=True))
    return encoded


def _admitted(
    request: Request, tenant: TenantInfo, encoded: EncodedText | None, encoder: TextEncoder
) -> AdmittedRequest | HmiError:
    if encoded is None:
        try:
            encoded = _checked_ids(request.input_ids or (), encoder)
        except InvalidRequestError as error:
            return error
    if encoded.truncated and request.long_text == "error":
        return TextTooLongError(
            f"the text has more than the model's {encoder.max_tokens} tokens; shorten it, or send it with "
            "long_text='truncate'"
        )
    return AdmittedRequest(request, tenant, encoded)


def _checked_ids(input_ids: Sequence[int], encoder: TextEncoder) -> EncodedText:
    ids = list(input_ids)
    for position, token in enumerate(ids):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < encoder.vocab_size:
            raise InvalidRequestError(
                f"input_ids[{position}] is {token!r}; token ids are integers from 0 to "
                f"{encoder.vocab_size - 1}"
            )
    kept = ids[: encoder.max_tokens]
    words = tuple((index, index, index + 1) for index in range(len(kept)))
    return EncodedText(kept, truncated=len(kept) < len(ids), words=words)
