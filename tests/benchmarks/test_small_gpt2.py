"""A small GPT-2: trained from scratch, distilled as docs/architecture.md says, its perplexity measured."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2LMHeadModel

import benchmarks.perplexity as perplexity
from benchmarks.distil_gpt2 import distil_gpt2
from benchmarks.distil_gpt2_student import HierarchicalStudent, drop_ngrams, teacher_states
from benchmarks.perplexity_models import HierarchicalModel, base_scores
from benchmarks.perplexity_scores import Scores, perplexity_ratio
from benchmarks.result import BenchmarkResult
from benchmarks.small_gpt2 import Sizes, train_gpt2
from benchmarks.small_gpt2_text import (
    END,
    Document,
    data_documents,
    installed_documents,
    pack,
    split_text,
    write_documents,
)
from benchmarks.small_gpt2_training import Recipe
from hmi_engine.errors import CheckpointError

SIZES = Sizes(layers=4, hidden=32, heads=4, vocab=300, positions=24)
RECIPE = Recipe(steps=12, batch=4, learning_rate=1e-2, checkpoint_every=4, evaluate_every=6)
PLOT_LAYERS = 2


class Interrupted(Exception):
    """Stands for the end of the process."""


def no_report(done: int, total: int, loss: float) -> None:
    pass


def interrupt_after(steps: int):
    def report(done: int, total: int, loss: float) -> None:
        if done == steps:
            raise Interrupted

    return report


@pytest.fixture(scope="module")
def documents() -> tuple[list[Document], list[Document]]:
    words = "the cell protein binds gene and drug model of data in text a parse file to open".split()  # noqa: SIM905
    generator = torch.Generator().manual_seed(0)
    sides = []
    for count in (250, 30):
        weights = 1 / torch.arange(1, len(words) + 1)
        draws = (torch.multinomial(weights, 12, replacement=True, generator=generator) for _ in range(count))
        sides.append([Document(" ".join(words[word] for word in draw), "words.py") for draw in draws])
    return sides[0], sides[1]


@pytest.fixture(scope="module")
def trained(documents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small_gpt2")
    train_gpt2(out, documents, SIZES, RECIPE, report=no_report)
    for name, side in zip(("train", "held_out"), documents, strict=True):
        write_documents(out / f"{name}.jsonl", side)
    return out


def test_training_lowers_the_loss(trained: Path) -> None:
    report = json.loads((trained / "training.json").read_text())
    assert len(report["losses"]) == RECIPE.steps
    assert report["losses"][-1] < 0.8 * report["losses"][0]
    steps, figures = zip(*report["held_out"], strict=True)
    assert steps == (0, 6, 12)
    assert figures[-1]["perplexity"] < 0.3 * figures[0]["perplexity"]
    assert not (trained / "checkpoint.safetensors").exists()


def test_the_reported_perplexity_is_the_saved_models(trained: Path, documents) -> None:
    model = GPT2LMHeadModel.from_pretrained(trained / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    kept = Tokenizer.from_file(str(trained / "tokenizer.json"))
    text = END + documents[1][0].text
    assert tokenizer(text)["input_ids"] == kept.encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    unseen = pack(documents[1], kept, SIZES.positions)
    with torch.no_grad():
        expected = math.exp(float(model(input_ids=unseen, labels=unseen).loss))
    report = json.loads((trained / "training.json").read_text())
    assert report["held_out_perplexity"] == pytest.approx(expected, rel=1e-5)


def test_a_resumed_training_is_the_same_bit_for_bit(trained: Path, documents, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train_gpt2(tmp_path, documents, SIZES, RECIPE, report=interrupt_after(7))
    assert (tmp_path / "checkpoint.safetensors").exists()  # of step 4: what came after is done again
    other = RECIPE.model_copy(update={"steps": 13})
    with pytest.raises(CheckpointError, match="another training"):
        train_gpt2(tmp_path, documents, SIZES, other, report=no_report)
    train_gpt2(tmp_path, documents, SIZES, RECIPE, report=no_report)
    resumed, whole = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, trained))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    losses, expected = (
        json.loads((folder / "training.json").read_text())["losses"] for folder in (tmp_path, trained)
    )
    assert losses == expected


def normalized(x, weight, bias):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def block(tensors, index, x, num_heads):
    """One block over one sequence [L, H], written out place by place and head by head."""
    w = {name.removeprefix(f"h.{index}."): each for name, each in tensors.items()}
    y = normalized(x, w["ln_1.weight"], w["ln_1.bias"])
    size = x.shape[1]
    q, k, v = (y @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"]).split(size, dim=1)
    context = torch.zeros_like(x)
    for head in range(num_heads):
        part = slice(head * size // num_heads, (head + 1) * size // num_heads)
        for t in range(len(x)):
            scores = k[: t + 1, part] @ q[t, part] / (size / num_heads) ** 0.5
            context[t, part] = scores.softmax(0) @ v[: t + 1, part]
    x = x + context @ w["attn.c_proj.weight"] + w["attn.c_proj.bias"]
    y = normalized(x, w["ln_2.weight"], w["ln_2.bias"]) @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"]
    y = 0.5 * y * (1 + torch.tanh((2 / math.pi) ** 0.5 * (y + 0.044715 * y**3)))
    return x + y @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]


def by_the_formula(student: HierarchicalStudent, ids: list[int], widths: list[int]) -> torch.Tensor:
    """DESIGN: h_t = LN_merge(R(g_t) + P[t]), R the last slot of the window alone, then the upper blocks."""
    state = student.gpt2.transformer.state_dict()
    tensors = {name: each.double() for name, each in state.items()}
    heads, num_layers = student.gpt2.config.n_head, student.gpt2.config.n_layer
    merged = []
    for t, width in enumerate(widths):
        window = ids[max(0, t + 1 - width) : t + 1]
        x = tensors["wte.weight"][window] + tensors["wpe.weight"][: len(window)]
        for index in range(student.plot_layers):
            x = block(tensors, index, x, heads)
        merged.append(x[-1] + student.position_embeddings[t].double())
    norm = student.layer_norm
    x = normalized(torch.stack(merged), norm.weight.double(), norm.bias.double())
    for index in range(student.plot_layers, num_layers):
        x = block(tensors, index, x, heads)
    x = normalized(x, tensors["ln_f.weight"], tensors["ln_f.bias"])
    return x @ tensors["wte.weight"].T


@pytest.fixture
def student(trained: Path) -> HierarchicalStudent:
    """A random model: weights large enough that wrong code would be seen."""
    torch.manual_seed(1)
    made = HierarchicalStudent(GPT2LMHeadModel.from_pretrained(trained / "model"), PLOT_LAYERS, 3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            is_norm = "ln_" in name or "layer_norm" in name
            torch.nn.init.normal_(parameter, mean=float(is_norm and name.endswith("weight")), std=0.2)
    return made


@torch.no_grad()
def test_the_student_follows_the_formula(student: HierarchicalStudent) -> None:
    sequences = torch.randint(0, 40, (3, 10), generator=torch.Generator().manual_seed(2))
    found = student(sequences).logits
    for ids, logits in zip(sequences.tolist(), found, strict=True):
        torch.testing.assert_close(
            logits.double(), by_the_formula(student, ids, [3] * 10), atol=1e-3, rtol=1e-3
        )
    widths = torch.randint(1, 4, (3, 10), generator=torch.Generator().manual_seed(3))
    found = student(sequences, widths).logits
    for ids, kept, logits in zip(sequences.tolist(), widths.tolist(), found, strict=True):
        torch.testing.assert_close(logits.double(), by_the_formula(student, ids, kept), atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_the_teacher_is_transformers_model(trained: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(trained / "model").eval()
    sequences = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(4))
    states = teacher_states(model, PLOT_LAYERS, sequences)
    expected = model(input_ids=sequences, output_hidden_states=True)
    torch.testing.assert_close(states.merged, expected.hidden_states[PLOT_LAYERS], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_dropped_ngrams() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size((2000, 20))
    assert bool((drop_ngrams(shape, 3, 0.0, generator) == 3).all())
    kept = drop_ngrams(shape, 3, 1.0, generator)
    shares = [float((kept == width).float().mean()) for width in (1, 2, 3)]
    assert shares == pytest.approx([1 / 6, 1 / 3, 1 / 2], abs=0.02)  # E[s^2] / 2, E[s] - that, 1 - E[s]
    assert set(drop_ngrams(shape, 2, 1.0, generator).unique().tolist()) == {1, 2}


def distil(trained: Path, out: Path, documents, report=no_report, **others) -> HierarchicalStudent:
    recipe = Recipe(steps=8, batch=4, learning_rate=1e-3, weight_decay=0.0, checkpoint_every=2)
    return distil_gpt2(
        trained / "model", out, documents, recipe, plot_layers=PLOT_LAYERS, report=report, **others
    )


@pytest.fixture(scope="module")
def distilled(trained: Path, documents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("distilled") / "model"
    distil(trained, out, documents)
    return out


def test_distillation_lowers_the_loss(trained: Path, student, documents, tmp_path: Path) -> None:
    """Of a random model, whose hidden states depend on all that came before."""
    shutil.copytree(trained / "model", tmp_path / "model")
    student.gpt2.save_pretrained(tmp_path / "model")
    distil(tmp_path, tmp_path / "distilled", documents, calibrated=False, dropped_share=0.0)
    losses = json.loads((tmp_path / "distilled" / "distillation.json").read_text())["losses"]
    assert losses[-1] < 0.8 * losses[0]


@torch.no_grad()
def test_a_distilled_folder_holds_the_student(trained: Path, distilled: Path) -> None:
    report = json.loads((distilled / "distillation.json").read_text())
    undistilled, last = report["undistilled"], report["held_out"][-1][1]
    assert last["teacher"] == undistilled["teacher"]
    assert last.keys() == undistilled.keys()
    base, learned = (load_file(folder / "model.safetensors") for folder in (trained / "model", distilled))
    changed = {name for name in base if not torch.equal(base[name], learned[name])}
    assert {name for name in base if ".h." in name} - changed <= {name for name in base if "bias" in name}
    assert not [name for name in changed if ".h." not in name]
    again = HierarchicalStudent(GPT2LMHeadModel.from_pretrained(distilled), PLOT_LAYERS, 3)
    merge = load_file(distilled / "merge.safetensors")
    again.position_embeddings.copy_(merge["position_embeddings"])
    again.layer_norm.weight.copy_(merge["layer_norm.weight"])
    again.layer_norm.bias.copy_(merge["layer_norm.bias"])
    ids = [1, 7, 7, 3, 9, 2]
    torch.testing.assert_close(
        again(torch.tensor([ids])).logits[0].double(),
        by_the_formula(again, ids, [3] * 6),
        atol=1e-3,
        rtol=1e-3,
    )


def test_a_resumed_distillation_is_the_same_bit_for_bit(
    trained: Path, distilled: Path, documents, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        distil(trained, tmp_path / "model", documents, interrupt_after(5))
    distil(trained, tmp_path / "model", documents)
    for name in ("model.safetensors", "merge.safetensors"):
        resumed, whole = (load_file(folder / name) for folder in (tmp_path / "model", distilled))
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)


@torch.no_grad()
def test_hmi_computes_what_the_student_computes(trained: Path, documents, tmp_path: Path) -> None:
    """Exact, and with a table that lacks n-grams, against transformers' modules."""
    general = trained / "model"
    student = HierarchicalStudent(GPT2LMHeadModel.from_pretrained(general), PLOT_LAYERS, 3)
    tokenizer = Tokenizer.from_file(str(general / "tokenizer.json"))
    encoded = [tokenizer.encode(END + each.text).ids[: SIZES.positions] for each in documents[1][:5]]
    with HierarchicalModel(tmp_path / "store", general, PLOT_LAYERS, row_dtype="float32") as model:
        exact = model.compute(encoded, "general", exact=True).logits
        expected = torch.cat([student(torch.tensor([ids])).logits[0] for ids in encoded])
        torch.testing.assert_close(exact, expected, atol=1e-3, rtol=1e-3)
        texts = [END + each.text for each in documents[0]]
        model.store.add_domain("words", texts, plot_bytes="24KiB")
        found = model.compute(encoded, "words", exact=False)
        assert found.references is not None
        whole, shorter = (found.references >= 0).unbind(1)
        lengths = (1 + shorter.long()).masked_fill(whole, 3).split([len(ids) for ids in encoded])
        assert {1, 2, 3} == set(torch.cat(lengths).tolist())
        expected = torch.cat(
            [
                student(torch.tensor([ids]), kept[None]).logits[0]
                for ids, kept in zip(encoded, lengths, strict=True)
            ]
        )
        torch.testing.assert_close(found.logits, expected, atol=1e-3, rtol=1e-3)
        scores = model.table_scores(encoded, "words")
    wanted = torch.cat([torch.tensor(ids[1:]) for ids in encoded])
    ends = torch.tensor([len(ids) for ids in encoded]).cumsum(0) - 1
    keep = torch.ones(len(expected), dtype=torch.bool).index_fill(0, ends, value=False)
    loss = torch.nn.functional.cross_entropy(expected[keep], wanted)
    assert scores.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-3)


def test_padding_does_not_change_the_bases_scores(trained: Path) -> None:
    documents = [[1, 5, 9, 3], [2, 8], [4, 4, 6, 1, 7, 9, 5]]
    together = base_scores(trained / "model", documents)
    alone = [base_scores(trained / "model", [ids]).losses[0] for ids in documents]
    assert together.losses == pytest.approx(alone, rel=1e-4)
    assert together.tokens == (3, 1, 6)


def test_ratios_are_of_the_same_documents() -> None:
    base = Scores(tuple(float(n) for n in range(1, 41)), tuple([10] * 40))
    worse = Scores(tuple(loss + 1.0 for loss in base.losses), base.tokens)
    ratio = perplexity_ratio(worse, base)
    assert [ratio.low, ratio.value, ratio.high] == pytest.approx([math.exp(0.1)] * 3)


@pytest.mark.parametrize("is_distilled", [False, True])
def test_perplexity_command(trained: Path, distilled: Path, tmp_path: Path, is_distilled: bool) -> None:
    out = tmp_path / "perplexity.json"
    more = ["--distilled", f"{PLOT_LAYERS}={distilled}"] if is_distilled else []
    perplexity.main(["--model", str(trained / "model"), "--out", str(out), "--quick", *more])
    result = BenchmarkResult.model_validate_json(out.read_text())
    rows = {row[0]: row[1:] for row in result.tables[0].rows}
    assert rows["base model"][3] == 1
    forms = ["undistilled", "distilled"] if is_distilled else ["undistilled"]
    names = [f"K = 2, {form}, {how}" for form in forms for how in ("exact", "256KiB")]
    assert list(rows) == ["base model", *names]
    assert all(row[1] < row[0] < row[2] for row in rows.values())
    shares = rows["K = 2, undistilled, 256KiB"][-3:]
    assert sum(shares) == pytest.approx(1)
    assert not out.with_suffix(".steps").exists()


def test_text_is_split_by_file(tmp_path: Path) -> None:
    package = tmp_path / "site" / "package"
    package.mkdir(parents=True)
    for number in range(80):
        body = f'def f():\n    """Module {"abcdefgh"[number % 8] * 3} does a thing of its own kind here."""\n'
        (package / f"m{number}.py").write_text(body)
    found = list(installed_documents(roots=[tmp_path / "site"]))
    assert len(found) == 80
    split = split_text(found, seed=0)
    assert len({document.text for document in (*split.train, *split.held_out)}) == len(split.train) + len(
        split.held_out
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.txt").write_text('{"text": "to learn", "label": "a"}\ntoken\tO\n')
    (tmp_path / "data" / "test.txt").write_text('{"text": "to  test"}\n{"other": 1}\n')
    train, held_out = data_documents(tmp_path / "data")
    assert ([each.text for each in train], [each.text for each in held_out]) == (["to learn"], ["to test"])
