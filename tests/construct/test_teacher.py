"""What teachers of several architectures say of a text, whatever texts stand beside it."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from hmi_engine.construct.objectives import OBJECTIVES
from hmi_engine.construct.teacher import Teacher
from hmi_engine.construct.training_data import EncodedTexts, TaskData
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.errors import UnsupportedModelError
from hmi_engine.knowledge.examples import TaggedExample
from hmi_engine.models.tokenization import TextEncoder

LABELS = ("cells", "none")
TEXTS = (
    "the cell",
    "the protein binds the gene",
    "results of a large study show that the new drug is not small",
    "a cell",
)


def save(model, tokenizer, folder):
    """A random model with logits far from each other, as ``save_pretrained`` writes one."""
    model.config.id2label = dict(enumerate(LABELS))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def probabilities(teacher, texts):
    data = TaskData(EncodedTexts(tuple(texts), [], []), [], [(number,) for number in range(len(texts))], "")
    return torch.cat(teacher.probabilities(data, LABELS))


def said_by_transformers(folder, texts, max_tokens):
    """Each text alone: nothing is padded."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            rows.append(model(input_ids=ids).logits.softmax(-1))
    return torch.cat(rows)


def gpt2(tiny_gpt2, folder, pad_token_id):
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=24,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=pad_token_id,
    )
    return save(GPT2ForSequenceClassification(config), tokenizer, folder)


@pytest.mark.parametrize("pad_token_id", [None, 0, 7])
def test_a_decoder_finds_the_end_of_each_text(tiny_gpt2, tmp_path, pad_token_id):
    """Its head reads the last token that is none of padding, which has any id or none."""
    torch.manual_seed(0)
    folder = gpt2(tiny_gpt2, tmp_path, pad_token_id)
    teacher = Teacher.load(folder, "classification", 128)
    assert teacher.max_tokens == 24
    together = probabilities(teacher, TEXTS)
    alone = torch.cat([probabilities(teacher, [text]) for text in TEXTS])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together, said_by_transformers(folder, TEXTS, 24))
    assert float((together[0] - together[2]).abs().max()) > 0.05


def test_positions_that_begin_behind_the_padding_token(tiny_bert, tmp_path):
    """RoBERTa has two positions that no token takes."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=22,
        pad_token_id=1,
    )
    folder = save(RobertaForSequenceClassification(config), tokenizer, tmp_path)
    teacher = Teacher.load(folder, "classification", 128)
    assert teacher.max_tokens == 20
    texts = ["the cell", "protein " * 60]
    torch.testing.assert_close(probabilities(teacher, texts), said_by_transformers(folder, texts, 20))


def test_a_model_without_positions_reads_what_it_is_given(tiny_bert, tmp_path):
    """XLNet has no limit, which its configuration calls -1, and wants padding in front of the text."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    config = XLNetConfig(vocab_size=len(tokenizer), d_model=32, n_layer=1, n_head=2, d_inner=64)
    folder = save(XLNetForSequenceClassification(config), tokenizer, tmp_path)
    teacher = Teacher.load(folder, "classification", 12)
    assert teacher.max_tokens == 12
    torch.testing.assert_close(probabilities(teacher, TEXTS), said_by_transformers(folder, TEXTS, 12))


def test_the_tokenizers_own_limit_counts(tiny_gpt2, tmp_path):
    folder = gpt2(tiny_gpt2, tmp_path, None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 9
    tokenizer.save_pretrained(folder)
    assert Teacher.load(folder, "classification", 128).max_tokens == 9


def test_of_a_text_without_tokens_it_says_nothing(tiny_bert, tmp_path):
    """The tokenizer adds no special tokens and leaves control characters out."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    bare.backend_tokenizer.post_processor = None
    folder = save(small_distilbert(len(tokenizer)), bare, tmp_path)
    found = probabilities(Teacher.load(folder, "classification", 16), ["the cell", "\x01"])
    torch.testing.assert_close(found.sum(1), torch.tensor([1.0, 0.0]))


def small_distilbert(vocab_size):
    config = DistilBertConfig(vocab_size=vocab_size, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    return DistilBertForSequenceClassification(config)


def test_a_model_that_fails_is_told(tiny_bert, tmp_path):
    """Its tokenizer knows more tokens than the model."""
    folder = save(small_distilbert(10), AutoTokenizer.from_pretrained(tiny_bert), tmp_path)
    teacher = Teacher.load(folder, "classification", 16)
    with pytest.raises(
        UnsupportedModelError, match=r"fails on texts of \d+ tokens: IndexError: index out of range"
    ):
        probabilities(teacher, TEXTS)


def metaspace_tokenizer():
    """As DeBERTa-v3, XLM-R and T5 have it: a space is a character of the token behind it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=40,
        special_tokens=["[UNK]"],
        unk_token="[UNK]",
        initial_alphabet=list("\u2581abcdefghijklmnopqrstuvwxyz"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(TEXTS) * 5, trainer)
    return tokenizer


def byte_level_tokenizer():
    """Bare: nothing takes the space out of a token's offsets, as RoBERTa's post-processor does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(list(TEXTS) * 5, trainer)
    return tokenizer


WORDS = (("the", "gene", "binds", "xyz", "the", "small", "cell"), ("xyz", "results", "of", "qq"))


@pytest.mark.parametrize("make", [metaspace_tokenizer, byte_level_tokenizer])
def test_words_are_asked_at_the_tokens_that_transformers_labels(tiny_bert, tmp_path, make):
    """A token may hold the space before its word, or be that space alone, of a word that it does not know."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make())
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    folder = save(DistilBertForTokenClassification(config), tokenizer, tmp_path)
    examples = [TaggedExample(words, LABELS[:1] * len(words)) for words in WORDS]
    examples.append(TaggedExample(("cell",), LABELS[1:]))
    objective = OBJECTIVES["token_classification"].learn(
        examples, TrainingSettings(task="token_classification")
    )
    data = objective.encode(examples, TextEncoder(tiny_bert, 48), 48)
    said = Teacher.load(folder, "token_classification", 48).probabilities(data, LABELS)
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    for words, found in zip(WORDS, said, strict=False):
        split = tokenizer(list(words), is_split_into_words=True, return_tensors="pt")
        assert tokenizer(" ".join(words))["input_ids"] == split["input_ids"][0].tolist()
        places = [split.word_ids().index(word) for word in range(len(words))]
        assert len(split.word_ids()) > len(words)
        with torch.no_grad():
            expected = model(input_ids=split["input_ids"]).logits[0, places].softmax(-1)
        torch.testing.assert_close(found, expected)


def test_other_white_space_is_of_no_word(tiny_bert, tmp_path):
    """A line break that is a token of its own is not taken for the first token of the word behind it."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer())
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    folder = save(DistilBertForTokenClassification(config), tokenizer, tmp_path)
    text, spans = "the\ncell", [(0, 3), (4, 8)]
    data = TaskData(
        EncodedTexts((text,), [], []), [], [(0,)], "", words=[torch.tensor([1, 2])], spans=[spans]
    )
    (found,) = Teacher.load(folder, "token_classification", 48).probabilities(data, LABELS)
    tokens = tokenizer(text)
    place = tokens.tokens().index("\u010a") + 1
    assert tokens.encodings[0].offsets[place][0] == 4
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens["input_ids"]])).logits
    torch.testing.assert_close(found[1], logits[0, place].softmax(-1))


def cut_the_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def empty_the_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def with_labels(names):
    def rename(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"id2label": names}))

    return rename


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_the_weights, "cannot be loaded as a teacher of classification: SafetensorError"),
        (empty_the_tokenizer, "cannot be loaded as a teacher of classification: KeyError"),
        (with_labels({0: "cells", 1: "none", 2: "more"}), r"shape \[2\], and by config.json \[3\]"),
        (with_labels({1: "cells", 2: "none"}), "numbers its labels 1, 2; number them from 0"),
        (with_labels(["cells", "none"]), "cannot be loaded"),
    ],
    ids=["weights", "tokenizer", "more labels", "from 1", "no table"],
)
def test_a_damaged_one_is_told(tiny_bert, tmp_path, damage, message):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    folder = save(small_distilbert(len(tokenizer)), tokenizer, tmp_path)
    damage(folder)
    with pytest.raises(UnsupportedModelError, match=message):
        Teacher.load(folder, "classification", 16)


def test_an_error_without_words_is_told_by_its_name(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
    error = AssertionError()
    with pytest.raises(UnsupportedModelError, match="classification: AssertionError"):
        Teacher.load(tmp_path, "classification", 16)
    error = MemoryError("no memory")  # whoever loads it says what to do
    with pytest.raises(MemoryError, match="no memory"):
        Teacher.load(tmp_path, "classification", 16)
