"""The differentiable layers: equal to those that serve; gradients equal to those of PEFT and plain torch."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch.nn import functional
from transformers import BertModel

from hmi_engine.construct.trainable_adapter import AppliedAdapter, TrainableAdapter
from hmi_engine.construct.trainable_layers import DenseBatch, TrainableLayers
from hmi_engine.construct.training_data import WordPlaces
from hmi_engine.errors import InvalidAdapterError
from hmi_engine.interop.bert_modules import LINEAR_SITES
from hmi_engine.knowledge.adapters import BOTTLENECK_SITES, KINDS, LORA_SITES, Site
from hmi_engine.models.packing import PackedSequences, Readout

LENGTHS = (9, 1, 12, 5)


@pytest.fixture
def base(make_store):
    """A store without domain layers: the plain base model."""
    return make_store(plot_layers=0)


@pytest.fixture
def sequences():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(5, 100, (length,), generator=generator).tolist() for length in LENGTHS]


def make_adapter(general, kind, layers=None, sites=None, **settings):
    generator = torch.Generator().manual_seed(1)
    adapter = TrainableAdapter(
        general,
        kind=kind,
        rank=5,
        layers=general.upper_layers if layers is None else layers,
        sites=sites,
        generator=generator,
        **settings,
    )
    for parameter in adapter.parameters():  # also those that start at zero
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return adapter


def dense_input(model, sequences, first):
    """Hidden states before layer ``first``, packed and padded (with noise, which must not matter)."""
    packed = PackedSequences.pack(sequences)
    with torch.no_grad():
        states = model.embed(packed.input_ids, packed.positions())
        states = model.run_layers(states, packed, first=0, last=first)
    padded = torch.randn(len(sequences), max(LENGTHS), states.shape[1])
    for row, part in zip(padded, states.split(packed.lengths), strict=True):
        row[: len(part)] = part
    return packed, states, DenseBatch(padded, torch.tensor(LENGTHS))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (1, 3), (3,)])
@pytest.mark.parametrize("kind", list(KINDS))
def test_equal_to_the_layers_that_serve(base, sequences, kind, layers, pooling):
    adapter = make_adapter(base.general, kind, layers, KINDS[kind].sites)
    packed, states, batch = dense_input(base.model, sequences, layers[0])
    with torch.no_grad():
        found = TrainableLayers(base.model, adapter).read(batch, pooling)
        output = base.model.run_layers(
            states,
            packed,
            first=layers[0],
            adapters=AppliedAdapter(adapter),
            readout=Readout.select(packed, [pooling == "cls"] * len(LENGTHS)),
        )
    if pooling == "mean":
        output = torch.stack([part.mean(0) for part in output.split(packed.lengths)])
    torch.testing.assert_close(found, output, atol=1e-5, rtol=1e-4)


def test_gradients_equal_those_of_peft(base, tiny_bert, sequences):
    adapter = make_adapter(base.general, "lora", layers=(1, 2, 3), sites=LORA_SITES, lora_scale=1.5)
    _, _, batch = dense_input(base.model, sequences, 1)
    weight = torch.randn(base.general.hidden_size)
    (TrainableLayers(base.model, adapter).read(batch, "mean") @ weight).square().sum().backward()

    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    config = LoraConfig(r=5, lora_alpha=7.5, target_modules=targets, layers_to_transform=[1, 2, 3])
    peft = get_peft_model(BertModel.from_pretrained(tiny_bert, attn_implementation="eager"), config).eval()
    modules = dict(peft.base_model.model.named_modules())
    theirs = {
        (layer, site): modules[f"encoder.layer.{layer}.{LINEAR_SITES[site]}"]
        for layer, site in adapter.places
    }
    blocks = adapter.to_adapter().blocks
    for place, module in theirs.items():
        module.lora_A["default"].weight.data.copy_(blocks[place].a.T)
        module.lora_B["default"].weight.data.copy_(blocks[place].b.T)
    pooled = torch.stack([peft(torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in sequences])
    (pooled @ weight).square().sum().backward()

    for layer, site in adapter.places:
        ours = adapter.blocks[f"layer_{layer:03d}_{site}"]
        module = theirs[layer, site]
        for mine, expected in ((ours.a, module.lora_A["default"]), (ours.b, module.lora_B["default"])):
            torch.testing.assert_close(mine.grad, expected.weight.grad.T, atol=1e-4, rtol=1e-3)


def tuned_by_peft(tiny_bert, kind):
    """PEFT's model of the adapter that ``train_alike`` trains, and its parameters by our places."""
    prefix = r"encoder\.layer\.[123]\."
    if kind == "lora":
        config = LoraConfig(
            r=5, lora_alpha=10, target_modules=["query", "value"], layers_to_transform=[1, 2, 3]
        )
    else:
        config = IA3Config(
            target_modules=prefix + r"(attention\.self\.(key|value)|output\.dense)",
            feedforward_modules=prefix + r"output\.dense",
        )
    model = get_peft_model(BertModel.from_pretrained(tiny_bert, attn_implementation="eager"), config).eval()
    modules = dict(model.base_model.model.named_modules())
    names = {Site.KEY_SCALE: Site.KEY, Site.VALUE_SCALE: Site.VALUE, Site.FFN_DOWN_INPUT_SCALE: Site.FFN_DOWN}

    def parameters(layer, site):
        module = modules[f"encoder.layer.{layer}.{LINEAR_SITES[names.get(site, site)]}"]
        if kind == "lora":
            return module.lora_A["default"].weight, module.lora_B["default"].weight
        return (module.ia3_l["default"],)

    return model, parameters


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_some_steps_of_training_lead_where_they_lead_peft(base, tiny_bert, sequences, kind):
    adapter = TrainableAdapter(
        base.general, kind=kind, rank=5, layers=(1, 2, 3), generator=torch.Generator().manual_seed(1)
    )
    peft, parameters = tuned_by_peft(tiny_bert, kind)
    with torch.no_grad():
        for (layer, site), block in adapter.to_adapter().blocks.items():
            for mine, theirs in zip(block.tensors().values(), parameters(layer, site), strict=True):
                theirs.copy_(mine.T if mine.dim() == 2 else mine.reshape(theirs.shape))
    _, _, batch = dense_input(base.model, sequences, 1)
    layers, weight = TrainableLayers(base.model, adapter), torch.randn(base.general.hidden_size)
    tuned = [parameter for place in adapter.places for parameter in parameters(*place)]

    def ours():
        return layers.read(batch, "mean")

    def theirs():
        states = [peft(torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in sequences]
        return torch.stack(states)

    before = ours().detach()
    for forward, trained in ((ours, list(adapter.parameters())), (theirs, tuned)):
        optimizer = torch.optim.SGD(trained, lr=0.02)
        for _ in range(3):
            optimizer.zero_grad()
            (forward() @ weight).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours(), theirs(), atol=1e-4, rtol=1e-3)
    assert (ours() - before).abs().max() > 0.01


BIASES = {
    Site.QUERY_BIAS: "attention.self.query",
    Site.KEY_BIAS: "attention.self.key",
    Site.VALUE_BIAS: "attention.self.value",
    Site.ATTENTION_OUTPUT_BIAS: "attention.output.dense",
    Site.FFN_UP_BIAS: "intermediate.dense",
    Site.FFN_DOWN_BIAS: "output.dense",
    Site.ATTENTION_NORM_BIAS: "attention.output.LayerNorm",
    Site.FFN_NORM_BIAS: "output.LayerNorm",
}


def test_gradients_of_biases_equal_those_of_transformers(base, tiny_bert, sequences):
    adapter = TrainableAdapter(
        base.general, kind="bitfit", rank=1, layers=(1, 2, 3), generator=torch.Generator()
    )
    _, _, batch = dense_input(base.model, sequences, 1)
    weight = torch.randn(base.general.hidden_size)
    (TrainableLayers(base.model, adapter).read(batch, "cls") @ weight).square().sum().backward()
    model = BertModel.from_pretrained(tiny_bert, attn_implementation="eager").eval()
    states = [model(torch.tensor([ids])).last_hidden_state[0, 0] for ids in sequences]
    (torch.stack(states) @ weight).square().sum().backward()
    modules = dict(model.named_modules())
    assert len(adapter.places) == 3 * len(BIASES)
    for layer, site in adapter.places:
        ours = adapter.blocks[f"layer_{layer:03d}_{site.value.replace('.', '_')}"].vector.grad
        expected = modules[f"encoder.layer.{layer}.{BIASES[site]}"].bias.grad
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)


def adapted_bert(tiny_bert, adapter, parameters):
    """transformers' BERT whose modules are replaced by the formulas of the bottleneck places."""
    model = BertModel.from_pretrained(tiny_bert, attn_implementation="eager").eval()

    def bottleneck(layer, site, x):
        if (layer, site) not in adapter.places:
            return 0.0
        down, down_bias, up, up_bias = parameters[layer, site]
        return functional.silu(x @ down + down_bias) @ up + up_bias

    def replace(layer, module, houlsby, pfeiffer):
        def forward(hidden_states, input_tensor):
            output = module.dense(hidden_states)
            output = output + bottleneck(layer, houlsby, output)
            if pfeiffer:
                output = output + bottleneck(layer, Site.PARALLEL_FFN, input_tensor)
                output = output + bottleneck(layer, pfeiffer, module.LayerNorm(output + input_tensor))
            return module.LayerNorm(output + input_tensor)

        module.forward = forward

    for number, layer in enumerate(model.encoder.layer):
        replace(number, layer.attention.output, Site.AFTER_ATTENTION, None)
        replace(number, layer.output, Site.AFTER_FFN, Site.AFTER_FFN_NORMALIZED)
    return model


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_gradients_equal_those_of_plain_torch(base, tiny_bert, sequences, pooling):
    adapter = make_adapter(base.general, "bottleneck", (2, 3), BOTTLENECK_SITES, activation="silu")
    _, _, batch = dense_input(base.model, sequences, 2)
    weight = torch.randn(base.general.hidden_size)
    (TrainableLayers(base.model, adapter).read(batch, pooling) @ weight).square().sum().backward()

    parameters = {
        place: [tensor.clone().requires_grad_() for tensor in block.tensors().values()]
        for place, block in adapter.to_adapter().blocks.items()
    }
    model = adapted_bert(tiny_bert, adapter, parameters)
    states = [model(torch.tensor([ids])).last_hidden_state[0] for ids in sequences]
    pooled = torch.stack([state[0] if pooling == "cls" else state.mean(0) for state in states])
    (pooled @ weight).square().sum().backward()

    for (layer, site), expected in parameters.items():
        block = adapter.blocks[f"layer_{layer:03d}_{site}"]
        ours = (block.down, block.down_bias, block.up, block.up_bias)
        for mine, reference in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine.grad, reference.grad, atol=1e-4, rtol=1e-3)


def test_words_are_read_where_they_are(base, sequences):
    adapter = make_adapter(base.general, "lora")
    packed, states, batch = dense_input(base.model, sequences, 0)
    words = WordPlaces(torch.tensor([0, 0, 2, 3]), torch.tensor([8, 0, 11, 4]))
    with torch.no_grad():
        found = TrainableLayers(base.model, adapter).read(batch, "words", words)
        output = base.model.run_layers(states, packed, first=0, adapters=AppliedAdapter(adapter))
    expected = output[packed.offsets[words.sequences] + words.places]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_starting_halfway_changes_nothing(base, sequences, pooling):
    """What of the first layer is computed once for all epochs gives the same result and gradients."""
    sites = (Site.AFTER_FFN, Site.AFTER_FFN_NORMALIZED)
    adapter = make_adapter(base.general, "bottleneck", (1, 2, 3), sites)
    _, _, batch = dense_input(base.model, sequences, 1)
    layers = TrainableLayers(base.model, adapter)
    assert layers.can_start_halfway
    halfway = DenseBatch(layers.start(batch), batch.lengths, halfway=True)
    gradients = []
    for start in (batch, halfway):
        adapter.zero_grad()
        pooled = layers.read(start, pooling)
        pooled.square().sum().backward()
        gradients.append([pooled.detach(), *(parameter.grad.clone() for parameter in adapter.parameters())])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "layers", "sites"),
    [
        ("lora", (1, 2), (Site.FFN_DOWN,)),
        ("bottleneck", (1, 2), (Site.AFTER_ATTENTION, Site.AFTER_FFN)),
        ("bottleneck", (3,), (Site.AFTER_FFN,)),
    ],
)
def test_who_cannot_start_halfway(base, kind, layers, sites):
    adapter = make_adapter(base.general, kind, layers, sites)
    assert not TrainableLayers(base.model, adapter).can_start_halfway


def test_the_base_gets_no_gradient(base, sequences):
    adapter = make_adapter(base.general, "lora")
    _, _, batch = dense_input(base.model, sequences, 0)
    TrainableLayers(base.model, adapter).read(batch, "cls").sum().backward()
    for layer in base.model.layers:
        for linear in (layer.query_key_value, layer.ffn_up, layer.ffn_down, layer.attention_output):
            assert not linear.weight.requires_grad
            assert linear.weight.grad is None


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_new_adapter_changes_nothing(base, sequences, kind):
    general = base.general
    adapter = TrainableAdapter(
        general, kind=kind, rank=3, layers=general.upper_layers, generator=torch.Generator().manual_seed(0)
    )
    packed, states, batch = dense_input(base.model, sequences, 0)
    with torch.no_grad():
        plain = base.model.run_layers(states, packed, first=0)
        found = TrainableLayers(base.model, adapter).read(batch, "cls")
    torch.testing.assert_close(found, plain[packed.offsets[:-1]], atol=1e-5, rtol=1e-4)


def test_settings_that_do_not_fit(make_store):
    general = make_store(plot_layers=2).general
    with pytest.raises(InvalidAdapterError, match="layer 1"):
        make_adapter(general, "lora", layers=(1, 2))
    with pytest.raises(InvalidAdapterError, match="activation"):
        make_adapter(general, "bottleneck", activation="square")
    with pytest.raises(InvalidAdapterError, match="query is not one of bottleneck"):
        make_adapter(general, "bottleneck", sites=(Site.QUERY,))
