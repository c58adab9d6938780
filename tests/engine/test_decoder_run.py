"""``Engine.run`` on decoders: what is interrupted or cannot begin, and what is counted of it."""

from __future__ import annotations

import pytest
from decoder_stores import WHOLE

import hmi_engine as hmi
from hmi_engine.generation.core import DecoderCore

REQUESTS = [hmi.Request("lora", text, sampling=WHOLE) for text in ("the cell", "a gene", "the drug")]


def second_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Of the sequences that are made from now on."""
    made, original = [], DecoderCore.sequence

    def sequence(*arguments, **settings):
        made.append(None)
        if len(made) == 2:
            raise error
        return original(*arguments, **settings)

    monkeypatch.setattr(DecoderCore, "sequence", sequence)


def test_an_interruption_while_requests_are_added_leaves_none_to_the_next_call(
    mixed_store: hmi.Store, monkeypatch
) -> None:
    with hmi.Engine(mixed_store) as engine:
        with monkeypatch.context() as patched:
            second_raises(patched, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                engine.run(REQUESTS)
        assert len(engine._core.loop) == 0
        assert not engine._core.residency._queue._waiting, "nobody waits for its weights any more"
        (answer,) = engine.run(REQUESTS[:1])
        assert answer.error is None
        assert engine.stats().generation["generated_tokens"] == WHOLE.max_tokens


def test_a_request_that_the_engine_cannot_begin_harms_no_other(mixed_store: hmi.Store, monkeypatch) -> None:
    with hmi.Engine(mixed_store) as engine:
        second_raises(monkeypatch, ZeroDivisionError("on purpose"))
        first, second, third = engine.run(REQUESTS)
    assert first.error is None and third.error is None
    assert isinstance(second.error, hmi.errors.EngineFaultError) and "on purpose" in str(second.error)
