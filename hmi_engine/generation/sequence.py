"""One request of a decoder on its way: its tokens, its blocks, and who is told of what it gives."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from hmi_engine.generation.block_pool import PrefixKeys
from hmi_engine.generation.text_stream import TextStream
from hmi_engine.generation.token_choice import NextToken, TokenChooser
from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.memory.residency import BatchTickets
from hmi_engine.models.tokenization import EncodedText
from hmi_engine.pipeline.admission import AdmittedRequest
from hmi_engine.request import Request, Response, TextPiece
from hmi_engine.sampling import Sampling

__all__ = ["DecoderSequence", "FinishReason"]


class FinishReason(str, enum.Enum):
    """Why a text ended."""

    STOP = "stop"
    """A stop string, or one of the model's end-of-text tokens."""
    LENGTH = "length"
    """``max_tokens``, or the model's positions."""

    def __str__(self) -> str:
        """Return the word used in responses."""
        return self.value


@dataclass(eq=False)
class DecoderSequence:
    """A request that was admitted.

    Attributes:
        request: as it came.
        tenant: the tenant's record, of the generation that is served.
        token_ids: prompt and generated tokens.
        num_prompt: how many are the prompt's.
        is_generating: whether tokens are generated; else a head reads the prompt's last hidden state.
        end_tokens: the tokens of which any ends a text.
        most_tokens: of prompt and text together.
        keys: names of full blocks.
        base_weights: a digest of what hidden states follow from before a tenant's first adapter, beside the
            tokens.
        base_keys: names of full blocks below that adapter, once they were asked for.
        respond: takes the response, once.
        emit: takes each piece of the text as it comes; None if nobody wants it.
        tickets: what memory was told of it.
        arrived: when its caller asked, in seconds of ``time.perf_counter``; so is ``started``, of its first
            step.
        chooser: chooses the tokens of a text.
        text: their text.
        logprobs: theirs, where the request asked for them.
        num_computed: tokens whose keys and values are in the cache.
        num_reused: of the prompt, those that were there already when the sequence first began.
        num_kept: full blocks that later sequences may begin with.
        blocks: of the cache, held.
        truncated: whether its text was cut to the model's positions.
        is_cancelled: set by whoever does not wait any more, from any thread.
    """

    request: Request
    tenant: TenantInfo
    token_ids: list[int]
    num_prompt: int
    is_generating: bool
    end_tokens: tuple[int, ...]
    most_tokens: int
    keys: PrefixKeys
    respond: Callable[[Response], None]
    tickets: BatchTickets
    arrived: float
    emit: Callable[[TextPiece], None] | None = None
    base_weights: bytes = b""
    base_keys: PrefixKeys | None = None
    chooser: TokenChooser | None = None
    text: TextStream | None = None
    logprobs: list[float] = field(default_factory=list)
    num_computed: int = 0
    num_reused: int = 0
    num_kept: int = 0
    blocks: list[int] = field(default_factory=list)
    is_cancelled: bool = False
    started: float | None = None
    truncated: bool = False

    @property
    def sampling(self) -> Sampling:
        """The request's settings."""
        return self.request.sampling

    @property
    def num_waiting(self) -> int:
        """Tokens that are not in the cache yet: 1 while a text is generated, many before."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        """How many tokens are behind the prompt."""
        return len(self.token_ids) - self.num_prompt

    @property
    def generated(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.token_ids[self.num_prompt :]

    def admitted(self) -> AdmittedRequest:
        """As it was admitted."""
        return AdmittedRequest(
            self.request, self.tenant, EncodedText(self.token_ids[: self.num_prompt], self.truncated, ())
        )

    def window(self, index: int, width: int) -> list[int]:
        """Token ``index`` behind the up to ``width`` - 1 tokens before it; -1 fills up to three places."""
        tokens = self.token_ids[max(0, index - width + 1) : index + 1]
        return tokens + [-1] * (3 - len(tokens))

    def choose(self, following: NextToken) -> FinishReason | None:
        """Takes the next token; returns why the text ends with it, if it does."""
        assert self.chooser is not None and self.text is not None
        chosen = self.chooser.choose(following, self.token_ids)
        token_id, sampling = chosen.token_id, self.request.sampling
        self.token_ids.append(token_id)
        if chosen.logprob is not None:
            self.logprobs.append(chosen.logprob)
        # Tokens become text when somebody looks at it: now, or all of them at the end.
        is_watched = self.emit is not None or sampling.stop
        piece = self.text.add(token_id) if is_watched else ""
        finish = None
        if self.text.is_stopped or (token_id in self.end_tokens and not sampling.ignore_end):
            finish = FinishReason.STOP
        elif self.num_generated >= sampling.max_tokens or len(self.token_ids) >= self.most_tokens:
            finish = FinishReason.LENGTH
        if finish is not None:
            piece += "" if is_watched else self.text.add(*self.generated)
            piece += self.text.finish()
        if self.emit is not None:
            self.emit(TextPiece(piece, token_id, chosen.logprob))
        return finish
