"""Requests that nobody can serve fail alone: in a list, beside other callers, on threads that serve on."""

from __future__ import annotations

import array
import asyncio
import math
import warnings

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import hmi_engine as hmi
from hmi_engine.errors import (
    DeadlineExceededError,
    EngineClosedError,
    EngineFaultError,
    InvalidRequestError,
    MissPolicyWarning,
)
from hmi_engine.models.tokenization import TextEncoder

SHORT = hmi.Sampling(max_tokens=4, ignore_end=True)
SECONDS = 60  # until a test gives up on an answer that will not come


@pytest.fixture(params=["encoders", "decoders"])
def served(request, make_head) -> hmi.Store:
    """A store of encoders or of decoders, with the tenants ``one`` and ``two``."""
    store = request.getfixturevalue("store" if request.param == "encoders" else "mixed_store")
    for name in ("one", "two"):
        head = hmi.GenerationHead() if request.param == "decoders" else make_head(store.general)
        domain = "news" if request.param == "decoders" else "words"
        store.add_tenant(name, domain=domain, adapter=hmi.Adapter({}), head=head)
    return store


def good(tenant: str = "one") -> hmi.Request:
    return hmi.Request(tenant, "the cell", sampling=SHORT)


def content(response: hmi.Response):
    assert response.error is None, response.error
    return response.text or response.scores


class Unreadable(list):
    """A list whose elements cannot be had."""

    def __iter__(self):
        raise ZeroDivisionError("on purpose")


BAD = {
    "half a surrogate pair": {"text": "the \ud800 cell"},
    "the other half": {"text": "\udfff"},
    "bytes": {"text": b"the cell"},
    "a list of texts": {"text": ["the cell"]},
    "a number": {"input_ids": 5},
    "a string": {"input_ids": "567"},
    "bytes of ids": {"input_ids": b"567"},
    "a set": {"input_ids": {5, 6}},
    "a dictionary": {"input_ids": {5: 6}},
    "an iterator": {"input_ids": iter([5, 6])},
    "nothing": {"input_ids": ()},
    "an empty array": {"input_ids": np.array([], dtype=np.int64)},
    "two dimensions": {"input_ids": np.array([[5, 6]])},
    "no dimension": {"input_ids": torch.tensor(5)},
    "an array of floats": {"input_ids": np.array([5.0, 6.0])},
    "a tensor of bools": {"input_ids": torch.tensor([True, False])},
    "a float": {"input_ids": [5, 6.0]},
    "a bool": {"input_ids": [5, True]},
    "a negative id": {"input_ids": torch.tensor([5, -1])},
    "lists in a list": {"input_ids": [[5, 6]]},
    "an id too long to print": {"input_ids": [5, 10**5000]},
    "a tenant too long to print": {"tenant": 10**5000, "text": "the cell"},
    "half a tenant": {"tenant": "one\ud800", "text": "the cell"},
    "a setting too long to print": {"text": "the cell", "sampling": hmi.Sampling(max_tokens=-(10**5000))},
    "what cannot be read": {"input_ids": Unreadable([5, 6])},
}


def test_in_one_list(served):
    bad = [hmi.Request(**({"tenant": "two", "id": name} | given)) for name, given in BAD.items()]
    with hmi.Engine(served) as engine:
        [expected] = engine.run([good()])
        first, *answers, last = engine.run([good(), *bad, good()])
    assert content(first) == content(last) == content(expected)
    for response, name in zip(answers, BAD, strict=True):
        assert isinstance(response.error, hmi.HmiError), name
        assert not isinstance(response.error, EngineFaultError), "none is the engine's own mistake"
        assert response.id == name


def test_beside_other_callers(served):
    async def main() -> list[hmi.Response]:
        async with hmi.AsyncEngine(served) as engine:
            asked = [good()]
            for given in BAD.values():
                asked += [hmi.Request(**({"tenant": "two"} | given)), good()]
            return await asyncio.wait_for(asyncio.gather(*map(engine.submit, asked)), SECONDS)

    answers = asyncio.run(main())
    assert len({str(content(response)) for response in answers[::2]}) == 1
    assert all(isinstance(response.error, hmi.HmiError) for response in answers[1::2])


def test_token_ids_of_any_integer_type_are_the_same_ids(served):
    [ids] = served.encoder.token_ids(["the cell binds"])
    forms = [
        ids,
        tuple(ids),
        np.array(ids),
        np.array(ids, dtype=np.uint16),
        torch.tensor(ids),
        torch.tensor(ids, dtype=torch.int32),
        [np.int64(token) for token in ids],
        list(torch.tensor(ids)),
        array.array("i", ids),
    ]
    with hmi.Engine(served) as engine:
        answers = engine.run([hmi.Request("one", input_ids=form, sampling=SHORT) for form in forms])
    assert [content(answer) for answer in answers] == [content(answers[0])] * len(forms)
    assert {answer.usage.tokens for answer in answers} == {len(ids)}


def test_a_tokenizer_that_throws_for_a_list_fails_the_text_that_it_cannot_read(served, monkeypatch):
    encode = TextEncoder.encode

    def strict(encoder, texts, **options):
        if any("drug" in text for text in texts):
            raise TypeError("on purpose")
        return encode(encoder, texts, **options)

    with hmi.Engine(served) as engine:
        [expected] = engine.run([good()])
        monkeypatch.setattr(TextEncoder, "encode", strict)
        first, bad, last = engine.run([good(), hmi.Request("two", "the drug"), good()])
    assert isinstance(bad.error, InvalidRequestError) and "on purpose" in str(bad.error)
    assert content(first) == content(last) == content(expected)


def test_tokens_that_the_model_has_no_row_for(served):
    """A tokenizer to which tokens were added, and a model whose embeddings were not made larger."""
    file = served.layout.root / "general" / "tokenizer.json"
    assert file.exists()
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(["[NEW]"])
    added = tokenizer.token_to_id("[NEW]")
    assert added == served.general.vocab_size
    tokenizer.save(str(file))
    with hmi.Store.open(served.layout.root, read_only=True) as store, hmi.Engine(store) as engine:
        assert store.encoder.vocab_size > store.general.vocab_size
        answers = engine.run(
            [
                good(),
                hmi.Request("two", "the [NEW] cell", sampling=SHORT),
                hmi.Request("two", input_ids=[5, added, 5], sampling=SHORT),
                hmi.Request("one", input_ids=[5, added - 1, 5], sampling=SHORT),
            ]
        )
    assert content(answers[0]) and content(answers[3])
    for answer in answers[1:3]:
        assert isinstance(answer.error, InvalidRequestError) and str(added) in str(answer.error)


def test_arguments_of_no_kind_are_refused_at_once(served):
    async def main() -> None:
        async with hmi.AsyncEngine(served) as engine:
            for given in ({"priority": "high"}, {"timeout": math.nan}, {"timeout": "soon"}):
                with pytest.raises(InvalidRequestError, match=next(iter(given))):
                    engine.submit_nowait(good(), **given)
            asked = (engine.submit(good(), timeout=each) for each in (0, -1, math.inf, 10**400, None))
            late, later, *others = await asyncio.wait_for(asyncio.gather(*asked), SECONDS)
            assert isinstance(late.error, DeadlineExceededError)
            assert isinstance(later.error, DeadlineExceededError)
            assert len({str(content(answer)) for answer in others}) == 1

    asyncio.run(main())


def test_limits_that_cannot_be_told_fail_the_request_that_they_are_for(served):
    limits = {"one": hmi.TenantLimits()}

    async def main() -> None:
        async with hmi.AsyncEngine(served, tenant_limits=limits.__getitem__) as engine:
            for _ in range(2):
                asked = [good("one"), good("two"), good("one")]
                answers = await asyncio.wait_for(asyncio.gather(*map(engine.submit, asked)), SECONDS)
                assert isinstance(answers[1].error, EngineFaultError) and "'two'" in str(answers[1].error)
                assert content(answers[0]) == content(answers[2])
            await engine.drain()
            assert not engine._core.residency._queue._waiting, "nobody's weights are waited for"

    asyncio.run(main())


def test_a_warning_that_is_an_error_fails_one_request(store, make_head):
    card = {"training": {"settings": {"miss": "exact"}}}
    for name, trained in (("one", {}), ("two", card)):
        store.add_tenant(
            name, domain="words", adapter=hmi.Adapter({}), head=make_head(store.general), card=trained
        )

    async def main() -> list[hmi.Response]:
        async with hmi.AsyncEngine(store) as engine:
            asked = [good("one"), good("two"), good("one")]
            return await asyncio.wait_for(asyncio.gather(*map(engine.submit, asked)), SECONDS)

    with warnings.catch_warnings():
        warnings.simplefilter("error", MissPolicyWarning)
        first, warned, last = asyncio.run(main())
    assert isinstance(warned.error, EngineFaultError) and "MissPolicyWarning" in str(warned.error)
    assert content(first) == content(last)


def test_what_was_taken_when_the_thread_broke_is_failed_too(served, monkeypatch):
    async def main() -> None:
        engine = hmi.AsyncEngine(served)

        def broken(*_) -> None:
            raise ZeroDivisionError("on purpose")

        monkeypatch.setattr(engine._queue, "_queue", broken)
        answers = asyncio.gather(*(engine.submit(good()) for _ in range(20)), return_exceptions=True)
        for error in await asyncio.wait_for(answers, SECONDS):
            assert isinstance(error, EngineClosedError)
        await asyncio.wait_for(engine.close(), SECONDS)

    asyncio.run(main())
