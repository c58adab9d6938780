"""Tenants that learn from a fine-tuned model beside the labels, or without any."""

import math

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from hmi_engine.construct.joint_training import TenantExamples, train_tenants
from hmi_engine.construct.lesson import Lesson, Teaching
from hmi_engine.construct.model_card_text import card_markdown
from hmi_engine.construct.objectives import OBJECTIVES
from hmi_engine.construct.objectives.objective import IGNORED
from hmi_engine.construct.teacher import Teacher
from hmi_engine.construct.training import TrainingBase, TrainingSettings
from hmi_engine.construct.training_loop import fit
from hmi_engine.errors import TrainingDataError, UnsupportedModelError
from hmi_engine.knowledge.examples import Example, RegressionExample, TaggedExample
from hmi_engine.memory.plots import PlotLibrary

QUICK = {"max_epochs": 2, "batch_size": 16, "rank": 4}
TOPICS = ("biology", "computing", "numbers")
TAGS = ("B-x", "I-x", "O")
CLOSE = {"atol": 2e-3, "rtol": 2e-2}


def save_teacher(tiny_bert, folder, model_class, labels, texts=("the cell binds",)):
    """A BERT with a random head, as ``save_pretrained`` writes one; it finds all labels in ``texts``."""
    torch.manual_seed(1)
    names = dict(enumerate(labels))
    model = model_class.from_pretrained(tiny_bert, id2label=names, label2id={v: k for k, v in names.items()})
    torch.nn.init.normal_(model.classifier.weight)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    with torch.no_grad():
        logits = torch.cat(
            [model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in texts], -2
        )
        logits = logits.flatten(0, -2)
        if len(logits) > len(labels):
            model.classifier.weight *= (2 / logits.std(0))[:, None]
            model.classifier.bias.copy_(-2 * logits.mean(0) / logits.std(0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def topics_teacher(tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers") / "topics"
    return save_teacher(tiny_bert, folder, AutoModelForSequenceClassification, TOPICS)


@pytest.fixture(scope="module")
def tags_teacher(tiny_bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers") / "tags"
    return save_teacher(tiny_bert, folder, AutoModelForTokenClassification, TAGS)


@pytest.fixture
def store(make_store, topic_examples):
    made = make_store()
    made.add_domain("topics", [example.text for example in topic_examples(60, seed=1)])
    return made


@pytest.fixture
def tagged(topic_examples):
    """Sentences, one word of them split by the tokenizer; the tags say nothing of the words."""

    def make(count, seed):
        sentences = []
        for number, example in enumerate(topic_examples(count, seed)):
            words = (*example.text.split(), "cell-binds")
            tags = ["O"] * len(words)
            tags[number % len(words)] = "B-x"
            sentences.append(TaggedExample(words, tuple(tags)))
        return sentences

    return make


def tensors(trained):
    blocks = [value for _, block in trained.adapter.ordered_blocks() for value in block.tensors().values()]
    return [*blocks, *trained.head.tensors().values()]


def encoded(store, task, examples, max_tokens=16):
    objective = OBJECTIVES[task].learn(examples, TrainingSettings(task=task))
    return objective, objective.encode(examples, store.encoder, max_tokens)


def test_the_teacher_says_what_transformers_says_of_texts(store, topics_teacher, topic_examples):
    examples = topic_examples(70, seed=3)  # more than a batch
    objective, data = encoded(store, "classification", examples)
    said = Teacher.load(topics_teacher, "classification", 16).probabilities(data, objective.labels)
    model = AutoModelForSequenceClassification.from_pretrained(topics_teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(topics_teacher)
    for found, example in zip(said, examples, strict=True):
        with torch.no_grad():
            logits = model(
                **tokenizer(example.text, truncation=True, max_length=16, return_tensors="pt")
            ).logits
        torch.testing.assert_close(found, logits.softmax(-1))


def test_the_teacher_says_what_transformers_says_of_words(store, tags_teacher, tagged):
    sentences = tagged(20, seed=3)
    objective, data = encoded(store, "token_classification", sentences, 10)
    said = Teacher.load(tags_teacher, "token_classification", 10).probabilities(data, objective.labels)
    model = AutoModelForTokenClassification.from_pretrained(tags_teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(tags_teacher)
    columns = [TAGS.index(label) for label in objective.labels]
    num_cut = 0
    for found, sentence in zip(said, sentences, strict=True):
        tokens = tokenizer(
            list(sentence.words),
            is_split_into_words=True,
            truncation=True,
            max_length=10,
            return_tensors="pt",
        )
        with torch.no_grad():
            logits = model(**tokens).logits[0].softmax(-1)
        words = tokens.word_ids()
        for word, row in enumerate(found):
            if word in words:
                torch.testing.assert_close(row, logits[words.index(word)][columns])
            else:
                assert not row.any()
                num_cut += 1
    assert num_cut


def test_words_of_unlabelled_texts_are_the_tokenizers(store, tags_teacher, tagged):
    objective, _ = encoded(store, "token_classification", tagged(4, seed=3))
    text = "the cell-binds gene"
    data = objective.encode_unlabelled([text, "cell " * 40], store.encoder, 8)
    assert [text[begin:end] for begin, end in data.spans[0]] == ["the", "cell", "-", "binds", "gene"]
    assert len(data.words[1]) == 6 == len(data.targets[1])
    assert all(bool((target == IGNORED).all()) for target in data.targets)
    said = Teacher.load(tags_teacher, "token_classification", 8).probabilities(data, objective.labels)
    assert [len(rows) for rows in said] == [5, 6]
    for rows in said:
        torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)))


def test_the_loss_row_by_row(store, topic_examples):
    """Labelled rows follow label and teacher, unlabelled ones the teacher, a row without either nothing."""
    objective, _ = encoded(store, "classification", topic_examples(9, seed=1))
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(4, 3, generator=generator)
    said = torch.rand(4, 3, generator=generator).softmax(-1)
    said[3] = 0
    targets = torch.tensor([2, IGNORED, 0, IGNORED])
    weight = 0.3
    found = Lesson(said.split(1), weight).loss(objective, outputs, targets, range(4))

    def logarithm(row, label):
        return float(outputs[row, label]) - math.log(sum(math.exp(float(value)) for value in outputs[row]))

    def taught(row):
        return -sum(float(said[row, label]) * logarithm(row, label) for label in range(3))

    mixed = [weight * taught(row) - (1 - weight) * logarithm(row, int(targets[row])) for row in (0, 2)]
    assert float(found) == pytest.approx((sum(mixed) + taught(1)) / 3, rel=1e-5)
    nothing = Lesson([torch.zeros(1, 3)], weight).loss(objective, outputs[:1], torch.tensor([IGNORED]), [0])
    assert float(nothing) == 0.0


def test_a_teacher_without_weight_changes_nothing(store, topics_teacher, topic_examples):
    settings = TrainingSettings(**QUICK, teacher_weight=0.0)
    examples = topic_examples(60, seed=1)
    alone = store.train_tenant("alone", examples, domain="topics", settings=settings)
    taught = store.train_tenant(
        "taught", examples, domain="topics", settings=settings, teacher=topics_teacher
    )
    for found, expected in zip(tensors(taught), tensors(alone), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("task", "plot_layers"), [("classification", 0), ("token_classification", 2)])
def test_the_teacher_is_learned(make_store, tiny_bert, tmp_path, topic_examples, tagged, task, plot_layers):
    """Labels say nothing here; whoever learns the teacher's answers agrees with it on new texts."""
    store = make_store(plot_layers=plot_layers)
    store.add_domain("topics", [example.text for example in topic_examples(60, seed=1)])
    if task == "classification":
        classes, labels = AutoModelForSequenceClassification, TOPICS
        examples = [
            Example(example.text, TOPICS[number % 3])
            for number, example in enumerate(topic_examples(60, seed=1))
        ]
    else:
        classes, labels = AutoModelForTokenClassification, TAGS
        examples = tagged(60, seed=1)
    unlabelled = [example.text for example in topic_examples(400, seed=5)]
    teacher = save_teacher(tiny_bert, tmp_path / "teacher", classes, labels, unlabelled[:50])
    settings = TrainingSettings(
        task=task,
        kind="lora",
        rank=8,
        sites="all-linear",
        max_epochs=1,
        batch_size=4,
        learning_rate=5e-3,
        teacher_weight=1.0,
    )
    objective, _ = encoded(store, task, examples)
    new = objective.encode_unlabelled(
        [example.text for example in topic_examples(120, seed=8)], store.encoder, 16
    )
    said = torch.cat(Teacher.load(teacher, task, 16).probabilities(new, objective.labels)).argmax(1)
    most_frequent = float(said.bincount().max() / len(said))
    assert most_frequent < 0.8

    def agreement(**options):
        base = TrainingBase(
            store.general,
            store.model,
            store.encoder,
            PlotLibrary(store.layout, store.catalog, store.general) if plot_layers else None,
            "topics",
            None,
        )
        training = base.prepare(examples, (), (), settings, Teaching.of(**options))
        fit(training.task, training.tenant, settings, training.generator)
        states = training.session.cache(new, training.tenant)
        outputs = training.tenant.predict(states, new, range(len(new)))
        return float((outputs.argmax(1) == said).float().mean())

    taught = agreement(teacher=teacher, unlabelled=unlabelled)
    assert taught > most_frequent + 0.1
    assert taught > agreement(teacher=None, unlabelled=()) + 0.1


def test_the_card_names_the_teacher(store, topics_teacher, topic_examples):
    texts = [example.text for example in topic_examples(30, seed=5)]
    trained = store.train_tenant(
        "t",
        topic_examples(60, seed=1),
        test_examples=topic_examples(20, seed=9),
        domain="topics",
        settings=TrainingSettings(**QUICK),
        teacher=topics_teacher,
        unlabelled=texts,
    )
    report = trained.report
    assert report.num_training + report.validation.num_examples == 60
    assert report.teacher.num_unlabelled == 30
    assert report.teacher.validation.num_examples == report.validation.num_examples
    assert report.teacher.test.num_examples == 20
    card = store.tenant_card("t")
    assert card.training == report
    text = card_markdown(card)
    assert report.teacher.sha256 in text and "its teacher, test (20 examples)" in text


def test_together_as_alone(store, topics_teacher, topic_examples):
    plots = PlotLibrary(store.layout, store.catalog, store.general)
    base = TrainingBase(store.general, store.model, store.encoder, plots, "topics", None)
    texts = tuple(example.text for example in topic_examples(30, seed=5))
    settings = TrainingSettings(**QUICK)
    many = [
        TenantExamples(
            "taught", topic_examples(60, 1), settings=settings, teacher=topics_teacher, unlabelled=texts
        ),
        TenantExamples("plain", topic_examples(60, 2), settings=settings),
        TenantExamples("wrong", topic_examples(60, 2), settings=settings, teacher=topics_teacher / "nowhere"),
    ]
    found = {given.name: outcome for given, outcome in train_tenants(base, many)}
    assert isinstance(found["wrong"], UnsupportedModelError)
    for given in many[:2]:
        expected = store.train_tenant(
            given.name,
            given.examples,
            domain="topics",
            settings=settings,
            teacher=given.teacher,
            unlabelled=given.unlabelled,
        )
        for one, other in zip(tensors(found[given.name]), tensors(expected), strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


class TestBadTeachers:
    @pytest.fixture
    def train(self, store, topic_examples):
        def run(teacher, examples=None, task="classification", unlabelled=()):
            with pytest.raises((TrainingDataError, UnsupportedModelError)) as caught:
                store.train_tenant(
                    "t",
                    topic_examples(60, seed=1) if examples is None else examples,
                    domain="topics",
                    settings=TrainingSettings(**QUICK, task=task),
                    teacher=teacher,
                    unlabelled=unlabelled,
                )
            assert "t" not in store.tenants
            return str(caught.value)

        return run

    def test_no_folder(self, train, tmp_path):
        assert "there is none" in train(tmp_path / "nowhere")

    def test_of_another_task(self, train, tags_teacher, tiny_bert):
        assert "bert.pooler" in train(tags_teacher) or "lacks" in train(tags_teacher)
        assert "not fine-tuned" in train(tiny_bert)

    def test_without_names_of_labels(self, train, tiny_bert, tmp_path):
        AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3).save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
        assert "id2label" in train(tmp_path)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (("biology", "computing"), "does not know the label 'numbers'"),
            ((*TOPICS, "weather"), "'weather' is none of the examples'"),
        ],
    )
    def test_with_other_labels(self, train, tiny_bert, tmp_path, labels, message):
        teacher = save_teacher(tiny_bert, tmp_path, AutoModelForSequenceClassification, labels)
        assert message in train(teacher)

    def test_pickles_are_not_read(self, train, tiny_bert, topics_teacher, tmp_path):
        model = AutoModelForSequenceClassification.from_pretrained(topics_teacher)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text((topics_teacher / "config.json").read_text())
        assert "safetensors" in train(tmp_path)

    def test_of_a_task_without_labels(self, train, topics_teacher):
        examples = [RegressionExample(f"cell {number}", number / 10) for number in range(20)]
        assert "learns from no teacher" in train(topics_teacher, examples, task="regression")

    def test_texts_without_a_teacher(self, train):
        assert "no teacher" in train(None, unlabelled=["the cell"])

    def test_a_blank_text(self, train, topics_teacher):
        assert "unlabelled text 1" in train(topics_teacher, unlabelled=["the cell", " "])


def test_a_teacher_of_another_architecture(store, tmp_path, tiny_bert, topic_examples):
    """Its own tokenizer, of the same texts: a wider model with fewer layers."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=48, n_layers=1, n_heads=2, hidden_dim=64)
    config.id2label = dict(enumerate(TOPICS))
    torch.manual_seed(0)
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    trained = store.train_tenant(
        "t", topic_examples(60, seed=1), domain="topics", settings=TrainingSettings(**QUICK), teacher=tmp_path
    )
    assert trained.report.teacher.validation.num_examples == trained.report.validation.num_examples
    assert AutoModel.from_pretrained(tmp_path).config.dim != store.general.hidden_size
