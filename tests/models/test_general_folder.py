"""Base models that cannot be served are refused with one of HMI's errors, and nothing is left of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GPT2LMHeadModel

import hmi_engine as hmi
from hmi_engine.errors import StoreCorruptError, UnsupportedModelError
from hmi_engine.models.general_folder import WEIGHTS_FILE
from hmi_engine.models.tokenization import TextEncoder


def change_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "pointer of git-lfs": lambda folder: (folder / WEIGHTS_FILE).write_text("version https://git-lfs...\n"),
    "truncated weights": lambda folder: truncate(folder / WEIGHTS_FILE),
    "empty tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "truncated tokenizer": lambda folder: truncate(folder / "tokenizer.json"),
    "other vocabulary": lambda folder: change_json(folder / "config.json", vocab_size=1000),
    "other width": lambda folder: change_json(folder / "config.json", hidden_size=36),
    "no heads": lambda folder: change_json(folder / "config.json", num_attention_heads=0),
    "no number": lambda folder: change_json(folder / "config.json", num_hidden_layers="x"),
    "no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "a list": lambda folder: (folder / "config.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_base_is_refused_whatever_the_library_raises(
    tiny_bert: Path, tmp_path: Path, damage: str
) -> None:
    base = Path(shutil.copytree(tiny_bert, tmp_path / "base"))
    DAMAGES[damage](base)
    with pytest.raises(UnsupportedModelError, match=f"{base}: .*load.*: .") as caught:
        hmi.Store.create(tmp_path / "store", general=base, plot_layers=0)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [base]


def add_token(source: Path, folder: Path) -> Path:
    """A copy of a base model whose tokenizer, and not the model, got a token to pad with."""
    shutil.copytree(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("base", ["tiny_bert", "tiny_gpt2"])
def test_tokens_that_the_model_does_not_know_are_refused(
    base: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = add_token(request.getfixturevalue(base), tmp_path / "base")
    with pytest.raises(UnsupportedModelError, match=r"'<added>' with id \d+.*resize_token_embeddings"):
        hmi.Store.create(tmp_path / "store", general=folder, plot_layers=0)
    assert list(tmp_path.iterdir()) == [folder]


def test_the_model_is_served_once_it_knows_the_tokens(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = add_token(tiny_gpt2, tmp_path / "base")
    model = GPT2LMHeadModel.from_pretrained(folder)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)))
    model.save_pretrained(folder)
    with hmi.Store.create(tmp_path / "store", general=folder, plot_layers=0) as store:
        assert store.encoder.vocab_size == store.general.vocab_size == model.config.vocab_size


def test_end_tokens_of_an_earlier_store_and_of_a_damaged_file(tiny_gpt2: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_gpt2, tmp_path / "general"))
    generation = folder / "generation_config.json"
    generation.unlink()
    for found, expected in ((0, (0,)), ([0, 9], (0, 9)), (None, ())):
        change_json(folder / "config.json", eos_token_id=found)
        assert TextEncoder(folder, 8).end_token_ids() == expected
    for content in ("{", "[]"):
        generation.write_text(content)
        with pytest.raises(StoreCorruptError, match="generation_config"):
            TextEncoder(folder, 8).end_token_ids()
