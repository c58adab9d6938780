"""Description of the general knowledge: the shape of the base model and how its domain layers are used."""

from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from hmi_engine.errors import UnsupportedModelError

__all__ = ["MAX_VOCAB_SIZE", "Family", "GeneralInfo", "row_slots_of"]

Family: TypeAlias = Literal["bert", "gpt2"]
"""Architecture of the base: an encoder (hBERT) or a decoder (hGPT)."""

MAX_VOCAB_SIZE = 2**21 - 2
"""An n-gram key holds 21 bits for each token, and the value 0 means an absent place."""


def row_slots_of(family: Family, window: int) -> int:
    """Return the hidden states of a row: one for each token of a window, of a decoder only the last one's."""
    return 1 if family == "gpt2" else window


class GeneralInfo(BaseModel):
    """Shape and identity of the base model of one store (one per store, kept in the catalog).

    ``num_layers`` is N, ``plot_layers`` is K; sizes are in elements. ``row_dtype`` is the type of PLOT rows
    on disk. ``domain_layers`` identifies the weights of layers 0..K-1 that domains inherit, so that tables
    made by other weights are never mixed. ``placeholder_token_id`` stands in the places of windows
    that hold no known token: the tokenizer's mask token, or else its unknown token; None where there are no
    domain layers and it has neither, and for a decoder, whose windows have no such places. ``folder`` is
    where its files lie in the store: a distillation writes a new one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: Family
    source: str
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    plot_layers: int
    window: Literal[2, 3]
    row_dtype: Literal["float16", "float32"]
    tokenizer_sha256: str
    placeholder_token_id: int | None
    domain_layers: str
    folder: str = "general"

    @property
    def is_causal(self) -> bool:
        """Whether the base is a decoder: a token sees those before it, and windows end with their token."""
        return self.family == "gpt2"

    @property
    def row_slots(self) -> int:
        """Number of hidden states of a row of the PLOT."""
        return row_slots_of(self.family, self.window)

    @property
    def num_upper_layers(self) -> int:
        """Number of layers that are always computed (N - K)."""
        return self.num_layers - self.plot_layers

    @property
    def upper_layers(self) -> range:
        """Indices K..N-1 of the layers that are always computed."""
        return range(self.plot_layers, self.num_layers)

    def check_supported(self) -> None:
        """Raise :class:`UnsupportedModelError` where the sizes are impossible or exceed the key format."""
        for name in ("num_layers", "hidden_size", "num_heads", "intermediate_size", "max_positions"):
            if getattr(self, name) < 1:
                raise UnsupportedModelError(
                    f"{self.source}: {name} is {getattr(self, name)}, must be at least 1"
                )
        if not 1 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise UnsupportedModelError(
                f"{self.source}: vocab_size is {self.vocab_size}; an n-gram key has 21 bits for each token, "
                f"so a vocabulary has 1 to {MAX_VOCAB_SIZE} entries"
            )
        if self.hidden_size % self.num_heads:
            raise UnsupportedModelError(
                f"{self.source}: hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}"
            )
        if not 0 <= self.plot_layers < self.num_layers:
            raise UnsupportedModelError(
                f"plot_layers is {self.plot_layers}, must be 0 to {self.num_layers - 1}: {self.source} has "
                f"{self.num_layers} layers and at least one must stay for the tenants' adapters"
            )
        if self.plot_layers and self.placeholder_token_id is None and not self.is_causal:
            raise UnsupportedModelError(
                f"{self.source}: its tokenizer has neither a mask token nor an unknown token, one of which "
                "has to stand for unknown neighbors in the PLOT; add one to it, or choose plot_layers=0"
            )
        if self.placeholder_token_id is not None and not 0 <= self.placeholder_token_id < self.vocab_size:
            raise UnsupportedModelError(
                f"{self.source}: the tokenizer's mask or unknown token has id {self.placeholder_token_id}, "
                f"but the model has only {self.vocab_size} tokens"
            )
