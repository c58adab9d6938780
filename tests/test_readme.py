"""The README's example runs as printed, with a small model and small files in the places it names."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import write_jsonl
from peft import LoraConfig, TaskType, get_peft_model
from transformers import BertForSequenceClassification

README = Path(__file__).parents[1] / "README.md"
KERNELS = README.parent / "docs" / "kernels.md"


def example(page: Path = README) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return block


@pytest.fixture
def prepared(tiny_bert, tmp_path, monkeypatch, corpus):
    """A folder with the files that the example names."""
    with gzip.open(tmp_path / "abstracts.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in corpus)
    labelled = [{"text": t, "label": "cell" if "cell" in t.split() else "other"} for t in corpus[:120]]
    write_jsonl(tmp_path / "chemprot.jsonl", labelled)
    torch.manual_seed(0)
    base = BertForSequenceClassification.from_pretrained(tiny_bert, num_labels=2)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["query", "value"])
    get_peft_model(base, config).save_pretrained(tmp_path / "peft-lora-folder")
    monkeypatch.chdir(tmp_path)


def test_the_example_runs(prepared, tiny_bert, capsys):
    code = example().replace("bert-base-uncased", str(tiny_bert)).replace("plot_layers=6", "plot_layers=2")
    assert "plot_layers=2" in code and str(tiny_bert) in code
    exec(compile(code, str(README), "exec"), {})
    answers = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in answers] == ["acme/chemprot", "acme/triage"]
    assert answers[0].split()[1] in ("cell", "other")
    assert answers[1].split()[1] in ("LABEL_0", "LABEL_1")


def test_the_example_of_the_kernels_runs(capsys):
    exec(compile(example(KERNELS), str(KERNELS), "exec"), {})
    backend, norm = capsys.readouterr().out.split()
    assert backend == ("cuda" if torch.cuda.is_available() else "cpu")
    assert float(norm) > 0


@pytest.mark.parametrize("page", [README, KERNELS], ids=["README", "kernels"])
def test_the_files_that_it_links_are_there(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert links and not missing
