"""Every kind of adapter and of head, all mixed in one batch, against hooks on transformers' BertModel."""

import pytest
import torch
from reference_adapters import adapted, head_values
from reference_hbert import merged, upper_layers
from transformers import AutoTokenizer, BertModel

import hmi_engine as hmi
from hmi_engine.knowledge.adapter_kinds import KINDS
from hmi_engine.knowledge.adapters import Site, random_adapter
from hmi_kernels import ACTIVATIONS

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def strong(adapter):
    """The same blocks, ten times as strong: what is left out or done in another order must show."""
    blocks = {}
    for place, block in adapter.blocks.items():
        if hasattr(block, "vector"):
            middle = 1 if type(block) is hmi.ScaleBlock else 0
            blocks[place] = type(block)(middle + 10 * (block.vector - middle))
        elif hasattr(block, "a"):
            blocks[place] = hmi.LoraBlock(10 * block.a, 10 * block.b, 0.7)
        else:
            activation = ACTIVATIONS[(place[0] + block.rank) % len(ACTIVATIONS)]
            parts = (10 * block.down, 10 * block.down_bias, 10 * block.up, 10 * block.up_bias)
            blocks[place] = hmi.BottleneckBlock(*parts, activation, 1.3)
    return hmi.Adapter(blocks)


def combined(*adapters):
    blocks = {}
    for adapter in adapters:
        blocks |= adapter.blocks
    return hmi.Adapter(blocks)


def adapters_of(general):
    """One for each site, one for each kind at all its sites, some mixtures, and none."""
    found = {"none": hmi.Adapter({})}
    for number, (name, kind) in enumerate(KINDS.items()):
        found[name] = strong(random_adapter(general, name, 3 + number, number, sites=kind.sites))
        for place, site in enumerate(kind.sites):
            one = random_adapter(general, name, 1 + place % 5, 50 + place, sites=[site])
            found[str(site)] = strong(one)
    everything = [random_adapter(general, name, 4, 90, sites=kind.sites) for name, kind in KINDS.items()]
    found["everything"] = strong(combined(*everything))
    low, high = general.upper_layers[0], general.upper_layers[-1]
    found["by_layer"] = strong(
        combined(
            random_adapter(general, "ia3", 1, 91, layers=[low]),
            random_adapter(general, "bitfit", 1, 92, layers=[high]),
            random_adapter(general, "lora", 8, 93, layers=[high]),
        )
    )
    return found


def heads_of(size):
    hidden = tuple(
        hmi.DenseLayer(normal(size, size, seed=i), normal(size, seed=9 + i), activation)
        for i, activation in enumerate(["tanh", None, "gelu"])
    )

    def projection(width, activation):
        return hmi.DenseLayer(normal(width, size, seed=width), normal(width, seed=1 + width), activation)

    linear = {"weight": normal(3, size, seed=20), "bias": normal(3, seed=21)}
    labels = ("a", "b", "c")
    heads = [
        hmi.ClassificationHead(labels, **linear, pooling="pooler"),
        hmi.ClassificationHead(labels, **linear, pooling="mean", multi_label=True, hidden=hidden[:1]),
        hmi.ClassificationHead(labels, **linear, pooling="cls", hidden=hidden),
        hmi.RegressionHead(("score",), linear["weight"][:1], linear["bias"][:1], "cls"),
        hmi.RegressionHead(labels, **linear, pooling="mean", hidden=hidden[2:]),
        hmi.EmbeddingHead("mean", normalize=False),
        hmi.EmbeddingHead(
            "cls", projection=hmi.DenseLayer(normal(7, size, seed=30), normal(7, seed=31), "tanh")
        ),
        hmi.EmbeddingHead(
            "pooler", False, hmi.DenseLayer(normal(50, size, seed=32), normal(50, seed=33), None)
        ),
        hmi.TokenClassificationHead(labels, **linear),
        hmi.TokenClassificationHead(labels, **linear, hidden=hidden[:2]),
    ]
    return {f"{head.kind}{number}": head for number, head in enumerate(heads)}


def check(response, expected, head, encoded_words):
    if head.kind == "embedding":
        torch.testing.assert_close(torch.from_numpy(response.embedding), expected, **TOLERANCE)
    elif head.kind == "token_classification":
        best, labels = expected[encoded_words].max(-1)
        found = torch.tensor([tag.score for tag in response.tags])
        torch.testing.assert_close(found, best, **TOLERANCE)
        assert [tag.label for tag in response.tags] == [head.labels[index] for index in labels]
    else:
        assert list(response.scores) == list(head.labels)
        torch.testing.assert_close(torch.tensor(list(response.scores.values())), expected, **TOLERANCE)


def first_tokens(encoded):
    words = encoded.word_ids()
    return [words.index(word) for word in dict.fromkeys(words) if word is not None]


def add_all(store, domain):
    """Every adapter with the first head, every head with some adapter; one request for each, shuffled."""
    adapters, heads = adapters_of(store.general), heads_of(store.general.hidden_size)
    first = next(iter(heads))
    pairs = {name: (adapter, heads[first]) for name, adapter in adapters.items()}
    names = list(adapters)
    for number, (name, head) in enumerate(heads.items()):
        pairs[name] = (adapters[names[3 * number % len(names)]], head)
    store.add_tenants(hmi.NewTenant(name, domain, adapter, head) for name, (adapter, head) in pairs.items())
    return pairs


@pytest.mark.parametrize("plot_layers", [0, 2])
@torch.no_grad()
def test_all_kinds_in_one_batch_equal_hooks_on_transformers(
    tiny_bert, tmp_path, corpus, make_sentences, plot_layers
):
    model = BertModel.from_pretrained(tiny_bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    with hmi.Store.create(
        tmp_path / "store", general=tiny_bert, plot_layers=plot_layers, row_dtype="float32"
    ) as store:
        if plot_layers:
            store.add_domain("words", corpus)
        pairs = add_all(store, "words" if plot_layers else "general")
        texts = make_sentences(2 * len(pairs), seed=3)
        names = [*pairs, *reversed(pairs)]
        requests = [hmi.Request(name, text=text) for name, text in zip(names, texts, strict=True)]
        with hmi.Engine(store, miss="exact") as engine:
            responses = engine.run(requests)
            assert engine.stats().batches == 1
    base = {text: base_input(model, tokenizer, text, plot_layers) for text in texts}
    changes = {}
    for request, response in zip(requests, responses, strict=True):
        assert response.error is None, response.error
        adapter, head = pairs[request.tenant]
        with adapted(model, adapter):
            states = upper_layers(model, base[request.text], plot_layers)
        words = first_tokens(tokenizer(request.text))
        check(response, head_values(model, states, head), head, words)
        plain = upper_layers(model, base[request.text], plot_layers)
        changes[request.tenant] = float((states - plain).abs().max())
    unseen = {name for name, change in changes.items() if change < 1e-3 and pairs[name][0].blocks}
    # A key's bias adds the same to all scores of a query: softmax does not see it, but with a scale it does.
    assert unseen <= {str(Site.KEY_BIAS)}, "an adapter that changes nothing tests nothing"


def base_input(model, tokenizer, text, plot_layers):
    ids = tokenizer(text)["input_ids"]
    if plot_layers:
        return merged(model, ids, plot_layers, 2)
    return model.embeddings(torch.tensor([ids]))[0]


def test_every_site_belongs_to_one_kind():
    sites = [site for kind in KINDS.values() for site in kind.sites]
    assert sorted(sites) == sorted(Site)
    assert all(set(kind.default_sites) <= set(kind.sites) for kind in KINDS.values())


def test_a_response_of_numbers_says_so_in_json(store):
    head = hmi.RegressionHead(("years",), torch.ones(1, 32), torch.zeros(1), "cls")
    store.add_tenant("age", domain="words", adapter=hmi.Adapter({}), head=head)
    with hmi.Engine(store) as engine:
        (response,) = engine.run([hmi.Request("age", text="the cell")])
    found = response.to_dictionary()
    assert found["kind"] == "regression"
    assert found["scores"].keys() == {"years"}
    assert "label" not in found
