"""What callers ask and what they get back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from hmi_engine.errors import HmiError, InvalidRequestError
from hmi_engine.sampling import Sampling

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Request", "Response", "Tag", "TextPiece", "Timing", "Usage"]

_GREEDY = Sampling()

ResponseKind = Literal[
    "classification", "token_classification", "embedding", "regression", "generation", "error"
]


@dataclass(frozen=True)
class Request:
    """One text for one tenant.

    Attributes:
        tenant: name of a tenant of the store.
        text: the text; or
        input_ids: its token ids, special tokens included; a numpy array or a tensor of them will do.
        long_text: what to do with more tokens than the model has positions: ``"truncate"`` (the response's
            ``usage.truncated`` says so) or ``"error"``. A tenant with a generation head always answers
            ``TextTooLongError``: a prompt that was cut would be continued in its middle.
        id: carried to the response as it is.
        sampling: how a tenant with a generation head generates; others don't look at it.
    """

    tenant: str
    text: str | None = None
    input_ids: Sequence[int] | None = None
    long_text: Literal["truncate", "error"] = "truncate"
    id: Any = None
    sampling: Sampling = _GREEDY

    def check(self) -> None:
        """Checks the request by itself.

        Raises:
            InvalidRequestError: a field is missing, empty or of the wrong type, or the text is no Unicode.
        """
        if not isinstance(self.tenant, str) or not self.tenant:
            raise InvalidRequestError(f"tenant must be a non-empty string, found {self.tenant!r:.80}")
        if (self.text is None) == (self.input_ids is None):
            raise InvalidRequestError("a request holds either text or input_ids")
        if self.text is not None:
            _check_text(self.text)
        else:
            _check_list(self.input_ids)
        if self.long_text not in ("truncate", "error"):
            raise InvalidRequestError(f"long_text is 'truncate' or 'error', found {self.long_text!r:.80}")
        if not isinstance(self.sampling, Sampling):
            raise InvalidRequestError(f"sampling must be a Sampling, found {type(self.sampling).__name__}")
        self.sampling.check()


def _check_text(text: object) -> None:
    if not isinstance(text, str) or not text.strip():
        found = "an empty text" if isinstance(text, str) else type(text).__name__
        raise InvalidRequestError(f"text must be a non-empty string, found {found}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # the tokenizer would refuse all texts that it gets with this one
        raise InvalidRequestError(
            f"text holds half of a surrogate pair ({text[error.start]!r}, character {error.start}), which is "
            "no character; send the whole pair, or leave it out"
        ) from None


def _check_list(input_ids: Any) -> None:
    """Checks that these are a list or an array; what each element is, only a model's vocabulary tells."""
    is_list = isinstance(input_ids, Sequence) and not isinstance(input_ids, str | bytes | bytearray)
    if not is_list and getattr(input_ids, "ndim", None) != 1:
        raise InvalidRequestError(
            "input_ids must be a list, a tuple or an array of one dimension of token ids, found "
            f"{type(input_ids).__name__}"
        )
    if len(input_ids) == 0:
        raise InvalidRequestError("input_ids is empty; it holds at least one token")


@dataclass(frozen=True)
class Tag:
    """The label of one word: characters ``start`` to ``end`` of the text (of input_ids: its index)."""

    start: int
    end: int
    label: str
    score: float


@dataclass(frozen=True)
class Usage:
    """Tokens of a request, and whether its text was cut to the model's positions.

    ``generated_tokens`` are those of a generated text, which ``tokens`` does not count; ``reused_tokens``
    those of the prompt whose keys and values were in the cache.
    """

    tokens: int = 0
    truncated: bool = False
    generated_tokens: int = 0
    reused_tokens: int = 0


@dataclass(frozen=True)
class Timing:
    """Seconds from the call of ``run`` or ``submit`` to the request's batch, of its preparation and compute.

    A decoder's ``compute_seconds`` are all from the request's first step to its end.
    """

    queue_seconds: float = 0.0
    prepare_seconds: float = 0.0
    compute_seconds: float = 0.0


@dataclass(frozen=True)
class TextPiece:
    """What a step added to a text: characters (maybe none yet), and the token that they came with."""

    text: str
    token_id: int
    logprob: float | None = None


@dataclass(frozen=True)
class Response:
    """The answer to one request; ``error`` is set where it could not be served, its neighbours unharmed.

    Attributes:
        tenant: the request's tenant.
        kind: what kind of head answered.
        label: classification: the best label (multi-label: None).
        scores: classification: label -> probability; regression: name -> number.
        tags: token classification: one tag per word.
        embedding: float32 numpy [H], or as long as the head's projection is wide.
        text: generation: what follows the prompt, up to a stop string.
        token_ids: generation: its tokens, those of a stop string included.
        logprobs: generation: their log-probabilities, where the request asked for them.
        finish_reason: generation: ``"stop"`` or ``"length"``.
        usage: tokens and truncation.
        timing: seconds spent.
        error: an :class:`~hmi_engine.errors.HmiError`, or None.
        id: the request's ``id``.
    """

    tenant: str
    kind: ResponseKind
    label: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    tags: tuple[Tag, ...] = ()
    embedding: npt.NDArray[np.float32] | None = None
    text: str | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None
    usage: Usage = Usage()
    timing: Timing = Timing()
    error: HmiError | None = None
    id: Any = None

    @classmethod
    def failed(cls, request: Request, error: HmiError) -> Response:
        """The response to a request that could not be served."""
        return cls(tenant=request.tenant, kind="error", error=error, id=request.id)

    def to_dictionary(self) -> dict[str, Any]:
        """The fields that say something, as JSON can hold them."""
        result: dict[str, Any] = {"tenant": self.tenant, "kind": self.kind}
        if self.id is not None:
            result["id"] = self.id
        if self.error is not None:
            result["error"] = {"type": type(self.error).__name__, "message": str(self.error)}
            return result
        if self.label is not None:
            result["label"] = self.label
        if self.scores:
            result["scores"] = self.scores
        if self.kind == "token_classification":
            result["tags"] = [vars(tag) for tag in self.tags]
        if self.embedding is not None:
            result["embedding"] = self.embedding.tolist()
        if self.kind == "generation":
            result |= {"text": self.text, "finish_reason": self.finish_reason}
            if self.logprobs:
                result |= {"token_ids": list(self.token_ids), "logprobs": list(self.logprobs)}
        result["usage"] = {
            name: value
            for name, value in vars(self.usage).items()
            if self.kind == "generation" or name in ("tokens", "truncated")
        }
        return result
