"""Every kind of adapter block, once more, as hooks on transformers' own BertModel: an independent oracle."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType

from torch import Tensor, nn
from torch.nn import functional
from transformers import BertModel

LINEARS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
}
ACTIVATIONS = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "tanh": nn.Tanh(),
}


def low_rank(block, x: Tensor) -> Tensor:
    return block.scale * (x @ block.a @ block.b)


def bottleneck(block, x: Tensor) -> Tensor:
    inner = ACTIVATIONS[block.activation](x @ block.down + block.down_bias)
    return block.scale * (inner @ block.up + block.up_bias)


@contextmanager
def adapted(model: BertModel, adapter) -> Iterator[None]:
    """While open, the model computes with a tenant's blocks; afterwards it is as it was."""
    with ExitStack() as stack:
        for layer in adapter.layers:
            blocks = {str(site): block for (at, site), block in adapter.blocks.items() if at == layer}
            _hook_layer(stack, model.encoder.layer[layer], blocks)
        yield


def _hook_layer(stack: ExitStack, layer: nn.Module, blocks: dict) -> None:
    for name, path in LINEARS.items():
        _hook_linear(stack, layer.get_submodule(path), name, blocks)
    for name, norm in (("attention_norm", layer.attention.output), ("ffn_norm", layer.output)):
        if f"{name}.bias" in blocks:
            bias = blocks[f"{name}.bias"].vector
            stack.enter_context(_hook(norm.LayerNorm, lambda x, out, bias=bias: out + bias))
    if "after_attention" in blocks:
        block = blocks["after_attention"]
        stack.enter_context(_hook(layer.attention.output.dense, lambda x, out: out + bottleneck(block, out)))
    if blocks.keys() & {"after_ffn", "after_ffn_normalized", "parallel_ffn"}:
        stack.enter_context(_feed_forward_end(layer.output, blocks))


def _hook_linear(stack: ExitStack, linear: nn.Linear, name: str, blocks: dict) -> None:
    def before(module, inputs):
        return (inputs[0] * blocks[f"{name}.input_scale"].vector,)

    def after(x: Tensor, out: Tensor) -> Tensor:
        if name in blocks:
            out = out + low_rank(blocks[name], x)
        if f"{name}.bias" in blocks:
            out = out + blocks[f"{name}.bias"].vector
        if f"{name}.scale" in blocks:
            out = out * blocks[f"{name}.scale"].vector
        return out

    if f"{name}.input_scale" in blocks:
        handle = linear.register_forward_pre_hook(before)
        stack.callback(handle.remove)
    stack.enter_context(_hook(linear, after))


@contextmanager
def _hook(module: nn.Module, change) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, inputs, out: change(inputs[0], out))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _feed_forward_end(output: nn.Module, blocks: dict) -> Iterator[None]:
    """AdapterHub's places around the last LayerNorm; ``attended`` is what the network reads as well."""

    def forward(self, inner: Tensor, attended: Tensor) -> Tensor:
        states = self.dense(inner)
        if "after_ffn" in blocks:
            states = states + bottleneck(blocks["after_ffn"], states)
        if "parallel_ffn" in blocks:
            states = states + bottleneck(blocks["parallel_ffn"], attended)
        if "after_ffn_normalized" in blocks:
            states = states + bottleneck(blocks["after_ffn_normalized"], self.LayerNorm(states + attended))
        return self.LayerNorm(states + attended)

    original = output.forward
    output.forward = MethodType(forward, output)
    try:
        yield
    finally:
        output.forward = original


def pooled(model: BertModel, last_hidden_state: Tensor, pooling: str) -> Tensor:
    """[n, H] -> [H]."""
    if pooling == "mean":
        return last_hidden_state.mean(0)
    return last_hidden_state[0] if pooling == "cls" else model.pooler(last_hidden_state[None])[0]


def dense(layer, x: Tensor) -> Tensor:
    out = functional.linear(x, layer.weight, layer.bias)
    return out if layer.activation is None else ACTIVATIONS[layer.activation](out)


def head_values(model: BertModel, last_hidden_state: Tensor, head) -> Tensor:
    """What a head makes of a sequence [n, H]: probabilities, numbers, or a vector."""
    if head.kind == "embedding":
        vector = pooled(model, last_hidden_state, head.pooling)
        vector = vector if head.projection is None else dense(head.projection, vector)
        return vector / vector.norm() if head.normalize else vector
    is_tagging = head.kind == "token_classification"
    states = last_hidden_state if is_tagging else pooled(model, last_hidden_state, head.pooling)
    for layer in head.hidden:
        states = dense(layer, states)
    logits = states @ head.weight.T + head.bias
    if head.kind == "regression":
        return logits
    return logits.sigmoid() if getattr(head, "multi_label", False) else logits.softmax(-1)
