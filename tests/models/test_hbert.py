"""hBERT against transformers: K = 0 is the plain model, K > 0 is the written-out mathematics."""

import pytest
import torch
from reference_hbert import backed_off, merged, upper_layers
from transformers import AutoTokenizer, BertModel

import hmi_engine as hmi
import hmi_kernels
from hmi_engine.errors import UnsupportedModelError
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.packing import PackedSequences, Readout

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def reference(tiny_bert):
    return BertModel.from_pretrained(tiny_bert).eval()


def pack(store, texts):
    return PackedSequences.pack(store.encoder.token_ids(texts))


def make_store(tiny_bert, tmp_path, corpus, window, plot_layers=2):
    store = hmi.Store.create(
        tmp_path / "store", general=tiny_bert, plot_layers=plot_layers, window=window, row_dtype="float32"
    )
    store.add_domain("words", corpus)
    return store


@torch.no_grad()
def test_k_0_equals_transformers(tiny_bert, tmp_path, held_out, reference):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    with hmi.Store.create(tmp_path / "store", general=tiny_bert, plot_layers=0) as store:
        sequences = pack(store, held_out)
        hidden = store.model.embed(sequences.input_ids, sequences.positions())
        hidden = store.model.run_layers(hidden, sequences, first=0)
    padded = tokenizer(held_out, padding=True, return_tensors="pt")
    expected = reference(**padded).last_hidden_state[padded["attention_mask"].bool()]
    torch.testing.assert_close(hidden, expected, **TOLERANCE)


@torch.no_grad()
def test_k_0_equals_transformers_on_real_weights(minilm, tmp_path):
    texts = ["HMI stores what models share once.", "A tenant!", "n-grams, looked up; " * 20]
    model = BertModel.from_pretrained(minilm).eval()
    padded = AutoTokenizer.from_pretrained(minilm)(texts, padding="longest", return_tensors="pt")
    expected = model(**padded).last_hidden_state[padded["attention_mask"].bool()]
    with hmi.Store.create(tmp_path / "store", general=minilm, plot_layers=0) as store:
        sequences = pack(store, texts)
        hidden = store.model.embed(sequences.input_ids, sequences.positions())
        hidden = store.model.run_layers(hidden, sequences, first=0)
    torch.testing.assert_close(hidden, expected, **TOLERANCE)


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("plot_layers", [1, 2])
@torch.no_grad()
def test_exact_mode_equals_the_mathematics(
    tiny_bert, tmp_path, corpus, held_out, reference, window, plot_layers
):
    with make_store(tiny_bert, tmp_path, corpus, window, plot_layers) as store:
        plots = PlotLibrary(store.layout, store.catalog, store.general).reading(["words"])
        sequences = pack(store, held_out[:8])
        domains = ["words"] * sequences.num_sequences
        references = plots.lookup(sequences, domains)
        assert (references[:, 0] < 0).any() and (references[:, 0] >= 0).any(), "hits and misses both needed"
        complete = plots.compute_misses(store.model, sequences, domains, references).references
        entered = plots.merge(store.model, sequences, domains, complete)
        final = store.model.run_layers(entered, sequences, first=plot_layers)
        for ids, part, last in zip(
            store.encoder.token_ids(held_out[:8]),
            entered.split(sequences.lengths),
            final.split(sequences.lengths),
            strict=True,
        ):
            expected = merged(reference, ids, plot_layers, window)
            torch.testing.assert_close(part, expected, **TOLERANCE)
            torch.testing.assert_close(last, upper_layers(reference, expected, plot_layers), **TOLERANCE)


@pytest.mark.parametrize("window", [2, 3])
@torch.no_grad()
def test_backoff_equals_the_mathematics(tiny_bert, tmp_path, corpus, held_out, reference, window):
    with make_store(tiny_bert, tmp_path, corpus, window) as store:
        plots = PlotLibrary(store.layout, store.catalog, store.general).reading(["words"])
        kept = set(plots.table("words").row_keys.tolist())

        def has(tokens):
            padded = [-1 if token is None else token for token in tokens] + [-1] * (3 - len(tokens))
            return int(hmi_kernels.ngram_keys(torch.tensor([padded], dtype=torch.int32))[0]) in kept

        sequences = pack(store, held_out[:8])
        domains = ["words"] * sequences.num_sequences
        entered = plots.merge(store.model, sequences, domains, plots.lookup(sequences, domains))
        for ids, part in zip(
            store.encoder.token_ids(held_out[:8]), entered.split(sequences.lengths), strict=True
        ):
            torch.testing.assert_close(part, backed_off(reference, ids, 2, window, has), **TOLERANCE)


@torch.no_grad()
def test_readout_computes_the_same_rows(store, held_out):
    sequences = pack(store, held_out)
    hidden = torch.randn(sequences.num_tokens, store.general.hidden_size)
    everything = store.model.run_layers(hidden, sequences, first=2)
    first_only = [index % 3 != 0 for index in range(sequences.num_sequences)]
    readout = Readout.select(sequences, first_only)
    rows = store.model.run_layers(hidden, sequences, first=2, readout=readout)
    torch.testing.assert_close(rows, everything[readout.rows], **TOLERANCE)
    assert Readout.select(sequences, [False] * sequences.num_sequences) is None


@torch.no_grad()
def test_gradients_and_inference_take_the_same_way(store, held_out):
    sequences = pack(store, held_out)
    hidden = torch.randn(sequences.num_tokens, store.general.hidden_size)
    inferred = store.model.run_layers(hidden, sequences, first=2)
    with torch.enable_grad():
        trained = store.model.run_layers(hidden, sequences, first=2)
    torch.testing.assert_close(inferred, trained, **TOLERANCE)


def test_windows_of_every_pattern(store, reference):
    from reference_hbert import run_window

    tokens = torch.tensor(
        [[7, 8, 9], [7, 8, -1], [-1, 8, 9], [-1, 8, -1], [9, 8, 7], [-1, -1, -1]], dtype=torch.int32
    )
    with torch.no_grad():
        states = store.model.window_states(tokens)
        for row, window in zip(states, tokens.tolist(), strict=True):
            present = {slot for slot, token in enumerate(window) if token >= 0}
            assert all(not row[slot].any() for slot in set(range(3)) - present)
            if present:
                expected = run_window(reference, [t if t >= 0 else None for t in window], 2)
                for slot, state in expected.items():
                    torch.testing.assert_close(row[slot], state, **TOLERANCE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "roberta"}, "model_type"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"is_decoder": True}, "is_decoder"),
    ],
)
def test_other_architectures_are_refused(tiny_bert, tmp_path, change, named):
    import json
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_bert, other)
    config = json.loads((other / "config.json").read_text()) | change
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=named):
        hmi.Store.create(tmp_path / "store", general=other)
    assert not list(tmp_path.glob("*store*")), "a failed creation leaves nothing behind"


def test_no_model_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnsupportedModelError, match="empty"):
        hmi.Store.create(tmp_path / "store", general=tmp_path / "empty")


@pytest.mark.parametrize("plot_layers", [-1, 4, 9])
def test_plot_layers_out_of_range(tiny_bert, tmp_path, plot_layers):
    with pytest.raises(UnsupportedModelError, match="plot_layers"):
        hmi.Store.create(tmp_path / "store", general=tiny_bert, plot_layers=plot_layers)


def test_base_without_pooler(tiny_bert, tmp_path, make_head):
    from transformers import BertModel

    folder = tmp_path / "without"
    import shutil

    shutil.copytree(tiny_bert, folder)
    BertModel.from_pretrained(tiny_bert, add_pooling_layer=False).save_pretrained(folder)
    with hmi.Store.create(tmp_path / "store", general=folder) as store:
        assert HierarchicalBert.load(store.layout.general, 2).pooler is None
        store.add_domain("words", ["the cell is small"])
        store.add_tenant("t", domain="words", adapter=hmi.Adapter({}), head=make_head(store.general))
        (response,) = hmi.Engine(store).run([hmi.Request("t", text="the cell")])
        assert "pooler" in str(response.error)
