"""The engine against transformers and PEFT with the same weights, and adapters in plain torch."""

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from reference_hbert import merged
from torch.nn import functional
from transformers import AutoTokenizer, BertForSequenceClassification, BertForTokenClassification

import hmi_engine as hmi
from hmi_engine.knowledge.adapters import Site
from hmi_engine.pipeline import batch_compute

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
MODULES = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]


@pytest.fixture(autouse=True, params=["whole", "in pieces"])
def piece_of_a_batch(request, monkeypatch):
    """Large batches are computed in pieces; here of 24 tokens and a few sequences."""
    if request.param == "in pieces":
        monkeypatch.setattr(batch_compute, "_PIECE_BYTES", 24 * 4 * 64)


def save_peft(tiny_bert, folder, seed, *, layers, task=TaskType.SEQ_CLS, **settings):
    """A random LoRA on the tiny BERT, saved as PEFT saves it."""
    torch.manual_seed(seed)
    kinds = {
        TaskType.SEQ_CLS: BertForSequenceClassification,
        TaskType.TOKEN_CLS: BertForTokenClassification,
    }
    model = kinds[task].from_pretrained(tiny_bert, num_labels=3)
    config = LoraConfig(task_type=task, layers_to_transform=layers, layers_pattern="layer", **settings)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "classifier" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    return folder


def peft_settings(number):
    return [
        {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]},
        {"r": 7, "lora_alpha": 3, "target_modules": MODULES, "use_rslora": True},
        {"r": 2, "lora_alpha": 2, "target_modules": MODULES, "rank_pattern": {"query": 5}},
    ][number % 3]


@torch.no_grad()
def test_k_0_equals_peft_for_many_tenants_at_once(tiny_bert, tmp_path, held_out):
    folders = [
        save_peft(tiny_bert, tmp_path / f"peft{i}", i, layers=[0, 1, 2, 3], **peft_settings(i))
        for i in range(6)
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    with hmi.Store.create(tmp_path / "store", general=tiny_bert, plot_layers=0) as store:
        for number, folder in enumerate(folders):
            store.import_peft(folder, tenant=f"t{number}", domain="general")
        requests = [hmi.Request(f"t{i % 6}", text=text) for i, text in enumerate(held_out)]
        responses = hmi.Engine(store).run(requests)
    for number, folder in enumerate(folders):
        base = BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
        model = PeftModel.from_pretrained(base, folder).eval()
        for request, response in zip(requests, responses, strict=True):
            if request.tenant == f"t{number}":
                expected = model(**tokenizer(request.text, return_tensors="pt")).logits.softmax(-1)[0]
                found = torch.tensor(list(response.scores.values()))
                torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("window", [2, 3])
@torch.no_grad()
def test_upper_layer_lora_through_the_plot_equals_peft(tiny_bert, tmp_path, corpus, held_out, window):
    folder = save_peft(tiny_bert, tmp_path / "peft", 3, layers=[2, 3], **peft_settings(1))
    base = BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    model = PeftModel.from_pretrained(base, folder).eval().base_model.model
    plain = BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=3).eval()
    with hmi.Store.create(
        tmp_path / "store", general=tiny_bert, plot_layers=2, window=window, row_dtype="float32"
    ) as store:
        store.add_domain("words", corpus)
        store.import_peft(folder, tenant="t", domain="words")
        texts = held_out[:8]
        responses = hmi.Engine(store, miss="exact").run([hmi.Request("t", text=text) for text in texts])
        for ids, response in zip(store.encoder.token_ids(texts), responses, strict=True):
            hidden = merged(plain.bert, ids, 2, window)[None]
            for layer in model.bert.encoder.layer[2:]:
                output = layer(hidden)
                hidden = output[0] if isinstance(output, tuple) else output
            expected = model.classifier(model.bert.pooler(hidden)).softmax(-1)[0]
            torch.testing.assert_close(torch.tensor(list(response.scores.values())), expected, **TOLERANCE)


@torch.no_grad()
def test_token_classification_equals_peft(tiny_bert, tmp_path, held_out):
    folder = save_peft(
        tiny_bert, tmp_path / "peft", 5, layers=[0, 1, 2, 3], task=TaskType.TOKEN_CLS, **peft_settings(0)
    )
    base = BertForTokenClassification.from_pretrained(tiny_bert, num_labels=3)
    model = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    with hmi.Store.create(tmp_path / "store", general=tiny_bert, plot_layers=0) as store:
        store.import_peft(folder, tenant="t", domain="general", labels=["O", "B", "I"])
        responses = hmi.Engine(store).run([hmi.Request("t", text=text) for text in held_out])
    for text, response in zip(held_out, responses, strict=True):
        encoded = tokenizer(text, return_tensors="pt")
        probabilities = model(**encoded).logits.softmax(-1)[0]
        words = encoded.word_ids()
        firsts = [words.index(word) for word in dict.fromkeys(words) if word is not None]
        assert len(response.tags) == len(text.split())
        assert [text[tag.start : tag.end] for tag in response.tags] == text.split()
        for tag, row in zip(response.tags, probabilities[firsts], strict=True):
            assert tag.label == ["O", "B", "I"][int(row.argmax())]
            assert tag.score == pytest.approx(float(row.max()), abs=1e-4)


def pfeiffer_layer(layer, hidden, block):
    """AdapterHub's ``seq_bn``: the adapter sees LN(ffn + input); its output joins the ffn's before the LN."""
    attended = layer.attention(hidden)
    attended = attended[0] if isinstance(attended, tuple) else attended
    output = layer.output.dense(layer.intermediate(attended))
    normalized = layer.output.LayerNorm(output + attended)
    return layer.output.LayerNorm(bottleneck(block, normalized) + output + attended)


def houlsby_layer(layer, hidden, attention_block, output_block):
    """AdapterHub's ``double_seq_bn``: a bottleneck behind each sublayer, inside its residual connection."""
    context = layer.attention.self(hidden)
    attended = layer.attention.output.dense(context[0] if isinstance(context, tuple) else context)
    attended = layer.attention.output.LayerNorm(attended + bottleneck(attention_block, attended) + hidden)
    output = layer.output.dense(layer.intermediate(attended))
    return layer.output.LayerNorm(output + bottleneck(output_block, output) + attended)


def bottleneck(block, x):
    activation = {"relu": functional.relu, "gelu": functional.gelu, "silu": functional.silu}[block.activation]
    return block.scale * (activation(x @ block.down + block.down_bias) @ block.up + block.up_bias)


def random_bottleneck(general, rank, activation, scale, seed):
    adapter = hmi.random_adapter(general, "bottleneck", rank, seed, sites=[Site.AFTER_FFN], layers=[2])
    block = adapter.blocks[2, Site.AFTER_FFN]
    return hmi.BottleneckBlock(
        block.down * 10, block.down_bias, block.up * 10, block.up_bias, activation, scale
    )


@torch.no_grad()
def test_bottlenecks_of_both_places_mixed_with_lora_and_base(store, tiny_bert, held_out, make_head):
    from transformers import BertModel

    model = BertModel.from_pretrained(tiny_bert).eval()
    general = store.general
    pfeiffer = {layer: random_bottleneck(general, 5, "relu", 1.0, layer) for layer in (2, 3)}
    houlsby = {
        layer: (
            random_bottleneck(general, 8, "gelu", 0.5, 10 + layer),
            random_bottleneck(general, 3, "silu", 2.0, 20 + layer),
        )
        for layer in (2, 3)
    }
    adapters = {
        "pfeiffer": {(layer, Site.AFTER_FFN_NORMALIZED): block for layer, block in pfeiffer.items()},
        "houlsby": {
            (layer, site): block
            for layer, blocks in houlsby.items()
            for site, block in zip((Site.AFTER_ATTENTION, Site.AFTER_FFN), blocks, strict=True)
        },
        "base": {},
    }
    head = make_head(general)
    for name, blocks in adapters.items():
        store.add_tenant(name, domain="words", adapter=hmi.Adapter(blocks), head=head)
    store.add_tenant("lora", domain="words", adapter=hmi.random_adapter(general, "lora", 4, 1), head=head)

    names = ["pfeiffer", "base", "houlsby", "lora"]
    requests = [hmi.Request(names[i % 4], text=text) for i, text in enumerate(held_out[:12])]
    responses = hmi.Engine(store, miss="exact").run(requests)
    for ids, request, response in zip(
        store.encoder.token_ids(held_out[:12]), requests, responses, strict=True
    ):
        if request.tenant == "lora":
            continue
        hidden = merged(model, ids, 2, 2)[None]
        for index in (2, 3):
            layer = model.encoder.layer[index]
            if request.tenant == "pfeiffer":
                hidden = pfeiffer_layer(layer, hidden, pfeiffer[index])
            elif request.tenant == "houlsby":
                hidden = houlsby_layer(layer, hidden, *houlsby[index])
            else:
                hidden = layer(hidden)
        logits = model.pooler(hidden)[0] @ head.weight.T + head.bias
        found = torch.tensor(list(response.scores.values()))
        # The store keeps rows as float16, hence the wider tolerance.
        torch.testing.assert_close(found, logits.softmax(-1), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@torch.no_grad()
def test_embeddings_equal_sentence_transformers_pooling(minilm, tmp_path, pooling):
    from transformers import BertModel

    texts = ["A short text.", "Another one, a little longer than the first."]
    encoded = AutoTokenizer.from_pretrained(minilm)(texts, padding="longest", return_tensors="pt")
    hidden = BertModel.from_pretrained(minilm).eval()(**encoded).last_hidden_state
    mask = encoded["attention_mask"][..., None]
    pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    with hmi.Store.create(tmp_path / "store", general=minilm, plot_layers=0) as store:
        head = hmi.EmbeddingHead(pooling=pooling)
        store.add_tenant("embed", domain="general", adapter=hmi.Adapter({}), head=head)
        responses = hmi.Engine(store).run([hmi.Request("embed", text=text) for text in texts])
    for response, expected in zip(responses, functional.normalize(pooled), strict=True):
        assert response.kind == "embedding"
        assert response.embedding.dtype == "float32"
        torch.testing.assert_close(torch.from_numpy(response.embedding), expected, **TOLERANCE)
