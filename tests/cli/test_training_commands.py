"""``hmi tenant train``, ``evaluate`` and ``card`` as a person types them."""

import json

import pytest
from cli.command_line import hmi
from conftest import write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hmi_engine.construct.distillation_settings import DistillationSettings
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.knowledge.adapters import LORA_SITES
from hmi_engine.store import Store


@pytest.fixture(scope="module")
def made(tiny_bert, tmp_path_factory, corpus):
    """A store without domain layers, and a file of examples."""
    folder = tmp_path_factory.mktemp("cli")
    created = hmi("init", folder / "store", "--general", tiny_bert, "--plot-layers", 0)
    assert created.returncode == 0, created.stderr
    write_jsonl(folder / "data.jsonl", [{"text": text, "label": label_of(text)} for text in corpus[:80]])
    return folder


def label_of(text):
    return "cells" if len(text.split()) > 8 else "none"


def train(made, name, *options, data="data.jsonl"):
    return hmi("tenant", "train", made / "store", name, "--data", made / data, "--epochs", 1, *options)


def test_train_card_evaluate(made):
    options = ["--kind", "lora", "--lora-alpha", 8, "--rslora", "--balanced", "--label-smoothing", 0.1]
    search = ["--search", "--search-rates", "1e-3,1e-2", "--search-ranks", 4, "--search-steps", 4]
    done = train(made, "a", *options, *search, "--test", made / "data.jsonl", "--max-tokens", 12, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["settings"]["rank"] == 4 and report["settings"]["class_weights"] == "balanced"
    assert len(report["search"]["trials"]) == 2
    assert f"{report['num_cut'] + report['test_num_cut']} texts were cut to 12 tokens" in done.stderr

    card = json.loads(hmi("tenant", "card", made / "store", "a", "--json").stdout)
    assert card["training"]["test"] == report["test"]
    text = hmi("tenant", "card", made / "store", "a").stdout
    assert text.startswith("# a\n") and report["data_sha256"] in text

    done = hmi("tenant", "evaluate", made / "store", "a", "--data", made / "data.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["task"] == "classification" and found["metrics"]["num_examples"] == 80
    assert set(found["metrics"]["intervals"]) == {"accuracy", "macro_f1"}
    shown = hmi("tenant", "evaluate", made / "store", "a", "--data", made / "data.jsonl").stdout
    assert "macro_f1" in shown and " to " in shown


@pytest.mark.parametrize("name", ["old.csv", "old.jsonl"])
def test_bytes_that_are_no_utf8_are_told_of_in_texts_and_refused_in_labels(made, name):
    rows = [(text, label) for label in ("none", "cells") for text in ("the cell", "a cell", "cells")]
    rows[0] = ("le fran\xe7ais", rows[0][1])

    def write(rows):
        lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]
        table = ["text,label", *(f"{text},{label}" for text, label in rows)]
        (made / name).write_bytes("\n".join(table if name.endswith("csv") else lines).encode("latin-1"))

    write(rows)
    done = train(made, f"old/{name}", data=name)
    assert done.returncode == 0, done.stderr
    assert "1 lines had bytes that are no UTF-8" in done.stderr
    write([*rows, ("a cell", "fran\xe7ais")])
    done = train(made, "older", data=name)
    assert done.returncode == 2
    assert f"{name}:" in done.stderr and "save the file as UTF-8" in done.stderr.replace("\n", " ")
    assert "older" not in hmi("tenant", "list", made / "store").stdout


def test_a_label_with_a_single_example_is_warned_of(made):
    rows = [*(made / "data.jsonl").read_text().splitlines(), '{"text": "the cell", "label": "rare"}']
    (made / "rare.jsonl").write_text("\n".join(rows))
    done = train(made, "rare", data="rare.jsonl")
    assert done.returncode == 0, done.stderr
    assert "no validation example has the label 'rare'" in " ".join(done.stderr.split())
    assert (
        "| labels that no validation example has | rare |"
        in hmi("tenant", "card", made / "store", "rare").stdout
    )


def test_a_tenant_that_learned_nothing_is_warned_of(made):
    done = train(made, "untrained", "--learning-rate", 1e-9, "--json")
    values = json.loads(done.stdout)["validation"]["values"]
    assert values["accuracy"] <= values["majority_accuracy"]
    assert "no better than always giving the commonest label" in " ".join(done.stderr.split())
    learned = train(made, "learned", "--epochs", 10, "--json")
    values = json.loads(learned.stdout)["validation"]["values"]
    assert values["accuracy"] > values["majority_accuracy"]
    assert "no better" not in learned.stderr


@pytest.fixture(scope="module")
def looked_up(tiny_bert, tmp_path_factory, corpus):
    """A store with two domains of the same text: documents that are the examples, and pairs of them."""
    folder = tmp_path_factory.mktemp("looked-up")
    texts = list(dict.fromkeys(corpus))[:80]
    write_jsonl(folder / "data.jsonl", [{"text": text, "label": label_of(text)} for text in texts])
    (folder / "texts.txt").write_text("\n".join(texts))
    pairs = [f"{first} {second}" for first, second in zip(texts[::2], texts[1::2], strict=True)]
    (folder / "pairs.txt").write_text("\n".join(pairs))
    with Store.create(folder / "store", general=tiny_bert, plot_layers=2) as store:
        for domain in ("texts", "pairs"):
            store.add_domain(domain, folder / f"{domain}.txt", min_count=1)
    return folder


def test_a_table_of_the_training_text_cut_otherwise_is_warned_of(looked_up):
    """Documents are known again and cross-fitted; parts of documents are not."""
    same = train(looked_up, "same", "--domain", "texts", "--json")
    cut = train(looked_up, "cut", "--domain", "pairs", "--json")
    same_rates, cut_rates = (json.loads(done.stdout)["hit_rates"] for done in (same, cut))
    assert same_rates["looked_up"] > 0.95 and same_rates["texts_in_corpus"] == 80
    assert cut_rates["looked_up"] > 0.95 and cut_rates["texts_in_corpus"] == 0
    assert cut_rates["cross_fitted"] == cut_rates["looked_up"] > same_rates["cross_fitted"]
    assert "only 0 of 80 texts are documents" in " ".join(cut.stderr.split())
    assert "are documents" not in same.stderr
    exact = train(looked_up, "exact", "--domain", "pairs", "--miss", "exact", "--json")
    assert exact.returncode == 0 and "are documents" not in exact.stderr


def test_lora_at_every_linear_layer(made):
    done = train(made, "wide", "--kind", "lora", "--rank", 2, "--sites", "all-linear", "--json")
    assert done.returncode == 0, done.stderr
    with Store.open(made / "store") as store:
        adapter, _ = store.load_tenant("wide")
    assert {site for _, site in adapter.blocks} == set(LORA_SITES)


def test_words_from_a_file_of_any_name(made, corpus):
    lines = "\n\n".join(
        "\n".join(f"{word} {'B-x' if word == 'cell' else 'O'}" for word in text.split()) for text in corpus
    )
    (made / "words.txt").write_text(lines)
    options = ["--task", "token_classification", "--format", "conll"]
    refused = train(made, "w", *options[:2], data="words.txt")
    assert refused.returncode == 2 and "must be given" in refused.stderr
    options += ["--validation", made / "words.txt"]
    done = train(made, "w", *options, "--json", data="words.txt")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best_by"] == "entity_f1"
    evaluate = ["tenant", "evaluate", made / "store", "w", "--data", made / "words.txt", "--format", "conll"]
    found = json.loads(hmi(*evaluate, "--json").stdout)["metrics"]["values"]
    assert found["entity_f1"] == pytest.approx(json.loads(done.stdout)["validation"]["values"]["entity_f1"])


def test_a_tenant_from_elsewhere_has_no_card(made):
    from hmi_engine import Adapter, ClassificationHead, Store

    with Store.open(made / "store") as store:
        import torch

        head = ClassificationHead(("cells", "none"), torch.randn(2, 32), torch.zeros(2), "cls")
        store.add_tenant("b", domain="general", adapter=Adapter({}), head=head, card={"from": "elsewhere"})
    assert "not trained here" in hmi("tenant", "card", made / "store", "b").stdout
    assert json.loads(hmi("tenant", "card", made / "store", "b", "--json").stdout) == {"from": "elsewhere"}
    done = hmi("tenant", "evaluate", made / "store", "b", "--data", made / "data.jsonl", "--json")
    assert 0 <= json.loads(done.stdout)["metrics"]["values"]["accuracy"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kind", "prefix"], "--kind"),
        (["--task", "translation"], "--task"),
        (["--format", "xml"], "--format"),
        (["--label-smoothing", 2], "--label-smoothing"),
        (["--rslora"], "lora_alpha"),
        (["--sites", "all-linear"], "lora"),
        (["--sites", "query,nowhere"], "--sites"),
        (["--pooling", "max"], "--pooling"),
        (["--seed", -1], "--seed"),
        (["--search", "--search-rates", "fast"], "--search-rates"),
        (["--search", "--search-ranks", "0"], "--rank"),
        (["--label-field", "class"], "holds no classification example"),
        (["--task", "regression"], "holds no regression example"),
        (["--validation", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_options_that_do_not_fit(made, options, message):
    done = train(made, "c", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "c" not in [
        tenant["name"] for tenant in json.loads(hmi("tenant", "list", made / "store", "--json").stdout)
    ]


def test_seeds_that_no_generator_takes(made):
    for seed in (-1, 2**63):
        evaluate = ["tenant", "evaluate", made / "store", "a", "--data", made / "data.jsonl"]
        done = hmi(*evaluate, "--seed", seed)
        assert done.returncode == 2 and "--seed" in done.stderr and "Traceback" not in done.stderr
        for settings in (TrainingSettings, DistillationSettings):
            with pytest.raises(ValueError, match="seed"):
                settings(seed=seed)
    assert TrainingSettings(seed=2**63 - 1).seed == DistillationSettings(seed=2**63 - 1).seed


def test_odd_quoting_names_the_line(made):
    (made / "odd.csv").write_text('text,label\nfine,a\n"he said "no"",b\n')
    done = train(made, "c", data="odd.csv")
    assert done.returncode == 2 and "odd.csv:3" in done.stderr and "quotation mark" in done.stderr


def test_a_teacher(made, tiny_bert, tmp_path, corpus):
    """A fine-tuned model labels text; the tenant's figures stand beside its own."""
    teacher = tmp_path / "teacher"
    names = {0: "cells", 1: "none"}
    AutoModelForSequenceClassification.from_pretrained(tiny_bert, id2label=names).save_pretrained(teacher)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(teacher)
    (tmp_path / "more.txt").write_text("\n".join(corpus[80:100]))
    options = ["--teacher", teacher, "--unlabelled", tmp_path / "more.txt", "--teacher-weight", 0.2]
    done = train(made, "taught", *options, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["teacher"]["num_unlabelled"] == 20 and report["settings"]["teacher_weight"] == 0.2
    assert "its teacher" in hmi("tenant", "card", made / "store", "taught").stdout

    line = {
        "name": "taught-too",
        "data": "data.jsonl",
        "teacher": str(teacher),
        "unlabelled": [str(tmp_path / "more.txt")],
    }
    (made / "manifest.jsonl").write_text(json.dumps(line | {"settings": {"max_epochs": 1, "max_tokens": 6}}))
    done = hmi("tenant", "train-many", made / "store", "--manifest", made / "manifest.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["report"]["teacher"]["sha256"] == report["teacher"]["sha256"]
    assert "taught-too: " in done.stderr and "texts were cut to 6 tokens" in done.stderr

    done = train(made, "x", "--unlabelled", tmp_path / "more.txt")
    assert done.returncode == 2 and "no teacher" in done.stderr

    body = write_jsonl(tmp_path / "body.jsonl", [{"body": "the cell"}, {"text": "a cell"}])
    rows = [{"body": text, "label": label_of(text)} for text in corpus[:40]]
    write_jsonl(made / "bodies.jsonl", rows)
    options = ["--teacher", teacher, "--unlabelled", body, "--text-field", "body", "--json"]
    done = train(made, "bodies", *options, data="bodies.jsonl")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["teacher"]["num_unlabelled"] == 1
    assert "left out: " in done.stderr and "body.jsonl:2: no string in field 'body'" in done.stderr


def test_files_that_hold_nothing_are_refused(made, tmp_path):
    """For one tenant and for many alike, whatever the file is for."""
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"other": "the cell"}])
    told = {
        "validation": "empty.jsonl holds no classification example",
        "test": "empty.jsonl holds no classification example",
        "unlabelled": "empty.jsonl holds no unlabelled text; is the field 'text' right?",
    }
    lines = [
        {"name": name, "data": str(made / "data.jsonl"), name: [str(empty)] if "un" in name else str(empty)}
        for name in told
    ]
    manifest = write_jsonl(tmp_path / "manifest.jsonl", lines)
    many = hmi("tenant", "train-many", made / "store", "--manifest", manifest, "--json")
    assert many.returncode == 1
    failures = {failure["name"]: failure for failure in json.loads(many.stdout)}
    for name, message in told.items():
        alone = train(made, name, f"--{name}", empty)
        assert alone.returncode == 2 and message in alone.stderr
        assert failures[name]["error"] == "CorpusError" and message in failures[name]["message"]
        assert f"{name}: left out: {empty}:1" in many.stderr


def test_splits_that_are_judged_by_other_figures_are_shown(made, corpus):
    pairs = [{"anchor": text, "positive": text.split()[0]} for text in corpus[:40]]
    scored = [
        {"first": text, "second": "the cell", "score": number} for number, text in enumerate(corpus[:20])
    ]
    write_jsonl(made / "pairs.jsonl", pairs)
    write_jsonl(made / "scored.jsonl", scored)
    settings = {"task": "embedding", "max_epochs": 1, "rank": 4}
    line = {"name": "vectors", "data": "pairs.jsonl", "test": "scored.jsonl", "settings": settings}
    write_jsonl(made / "vectors.jsonl", [line])
    done = hmi("tenant", "train-many", made / "store", "--manifest", made / "vectors.jsonl")
    assert done.returncode == 0, done.stderr
    assert "retrieval_accuracy" in done.stdout and "spearman" in done.stdout
