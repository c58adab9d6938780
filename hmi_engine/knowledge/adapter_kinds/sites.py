"""The places inside a transformer layer where a tenant's blocks act, and the sizes of the linear layers."""

from enum import Enum

from hmi_engine.knowledge.general import GeneralInfo

__all__ = ["QUERY_KEY_VALUE", "Site", "linear_sizes"]


class Site(str, Enum):
    """A place inside a transformer layer where an adapter's block acts; the place decides the block's kind.

    Whatever a tenant mixes, the order at one linear layer is: its input is scaled, the linear with the base's
    bias, LoRA on the scaled input, the tenant's bias, the tenant's scale.
    """

    QUERY = "query"
    KEY = "key"
    VALUE = "value"
    ATTENTION_OUTPUT = "attention_output"
    FFN_UP = "ffn_up"
    FFN_DOWN = "ffn_down"

    AFTER_ATTENTION = "after_attention"
    """Houlsby: on the attention's output projection, before its residual and LayerNorm."""
    AFTER_FFN = "after_ffn"
    """Houlsby: on the raw output of the feed-forward network."""
    AFTER_FFN_NORMALIZED = "after_ffn_normalized"
    """Pfeiffer (``seq_bn``): on LayerNorm(feed-forward output + residual input)."""
    PARALLEL_FFN = "parallel_ffn"
    """He et al. 2021: on the feed-forward network's input, added to its output before the residual."""

    QUERY_SCALE = "query.scale"
    KEY_SCALE = "key.scale"
    VALUE_SCALE = "value.scale"
    ATTENTION_OUTPUT_SCALE = "attention_output.scale"
    FFN_UP_SCALE = "ffn_up.scale"
    FFN_DOWN_SCALE = "ffn_down.scale"
    ATTENTION_OUTPUT_INPUT_SCALE = "attention_output.input_scale"
    FFN_UP_INPUT_SCALE = "ffn_up.input_scale"
    FFN_DOWN_INPUT_SCALE = "ffn_down.input_scale"

    QUERY_BIAS = "query.bias"
    KEY_BIAS = "key.bias"
    VALUE_BIAS = "value.bias"
    ATTENTION_OUTPUT_BIAS = "attention_output.bias"
    FFN_UP_BIAS = "ffn_up.bias"
    FFN_DOWN_BIAS = "ffn_down.bias"
    ATTENTION_NORM_BIAS = "attention_norm.bias"
    FFN_NORM_BIAS = "ffn_norm.bias"

    def __str__(self) -> str:
        """Return the value: the word used in files and messages."""
        return self.value


QUERY_KEY_VALUE = (Site.QUERY, Site.KEY, Site.VALUE)
"""Sites of LoRA on projections of the same hidden states: one call of a kernel adds all three."""


def linear_sizes(linear: str, general: GeneralInfo) -> tuple[int, int]:
    """Return the sizes of input and output of ``"query"`` and the other linear layers."""
    inputs = general.intermediate_size if linear == "ffn_down" else general.hidden_size
    outputs = general.intermediate_size if linear == "ffn_up" else general.hidden_size
    return inputs, outputs
