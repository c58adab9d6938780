"""The commands of the domain tree as a person types them."""

import io
import json
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from cli.command_line import hmi
from conftest import sentences, write_jsonl
from safetensors.torch import save_file
from tokenizers import Tokenizer

import hmi_kernels
from hmi_engine import Store
from hmi_engine.knowledge.traffic_file import TrafficCounts


@pytest.fixture
def made(tiny_bert, tmp_path):
    """A store with a tree made by the commands: general <- words <- cells."""
    store = tmp_path / "store"
    assert hmi("init", store, "--general", tiny_bert, "--plot-layers", 2).returncode == 0
    words = write_jsonl(tmp_path / "words.jsonl", [{"text": text} for text in sentences(60)])
    cells = tmp_path / "cells.txt"
    cells.write_text("\n".join(sentences(60, seed=7)))
    for name, parent, corpus in (("words", "general", words), ("cells", "words", cells)):
        done = hmi("domain", "add", store, name, "--corpus", corpus, "--parent", parent, "--json")
        assert done.returncode == 0, done.stderr
    return store


def shown(store, *arguments):
    done = hmi("domain", "show", store, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return {domain["name"]: domain for domain in json.loads(done.stdout)}


def test_add_from_standard_input_with_a_format(made):
    text = "\n".join(json.dumps({"body": text}) for text in sentences(40, seed=3)) + "\n"
    stream = SimpleNamespace(buffer=io.BytesIO(text.encode() + b'{"body": "the cell \xff"}\n'))
    options = (
        "--stdin-format",
        "jsonl",
        "--text-field",
        "body",
        "--row-format",
        "int8",
        "--count-memory",
        "64MiB",
    )
    with mock.patch("hmi_engine.knowledge.corpus_lines.sys", SimpleNamespace(stdin=stream)):
        done = hmi("domain", "add", made, "small", "--corpus", "-", *options, "--json")
    assert done.returncode == 0, done.stderr
    added = json.loads(done.stdout)
    assert (added["row_format"], added["texts"], added["replaced_lines"]) == ("int8", 41, 1)
    assert "U+FFFD" in done.stderr


def test_show_prints_the_tree(made):
    printed = hmi("domain", "show", made).stdout
    lines = [line for line in printed.splitlines() if line.split()[-1] in ("general", "words", "cells")]
    assert [line.index(line.split()[-1]) for line in lines] == [0, 4, 8], "each below its parent"
    assert "float32" in printed or "float16" in printed
    assert "256.0 MiB" in printed or "256 MiB" in printed
    assert list(shown(made, "words")) == ["words", "cells"]


def test_coverage_of_a_sample_is_that_of_a_count_by_hand(made, tiny_bert, tmp_path):
    texts = sentences(30, seed=11)
    sample = write_jsonl(tmp_path / "sample.jsonl", [{"text": text} for text in texts])
    tokenizer = Tokenizer.from_file(str(tiny_bert / "tokenizer.json"))
    bigrams = [pair for text in texts for pair in pairwise(tokenizer.encode(text).ids)]

    def kept(file, parse):
        seen = {}
        for line in (tmp_path / file).read_text().splitlines():
            for pair in pairwise(tokenizer.encode(parse(line)).ids):
                seen[pair] = seen.get(pair, 0) + 1
        return {pair for pair, count in seen.items() if count >= 2}

    words = kept("words.jsonl", lambda line: json.loads(line)["text"])
    cells = kept("cells.txt", str) - words  # what an ancestor holds is not stored again
    measured = {
        name: domain["sample"]
        for name, domain in shown(made, "--sample", sample).items()
        if name != "general"
    }
    in_words = sum(pair in words for pair in bigrams)
    in_cells = sum(pair in cells for pair in bigrams)
    assert measured["words"]["windows"] == measured["cells"]["windows"] == len(bigrams)
    assert measured["words"]["found"] == in_words
    assert measured["cells"]["found_in"]["cells"] == in_cells
    assert measured["cells"]["found_in"]["words"] == in_words
    assert measured["cells"]["distinct_missing"] == len(set(bigrams) - words - cells)
    assert "windows" in hmi("domain", "show", made, "--sample", sample).stdout


def test_trigrams_without_a_row_are_composed_of_bigrams(tiny_bert, tmp_path):
    store = tmp_path / "store"
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(sentences(60)))
    assert hmi("init", store, "--general", tiny_bert, "--plot-layers", 1, "--window", 3).returncode == 0
    assert hmi("domain", "add", store, "words", "--corpus", corpus).returncode == 0
    sample = shown(store, "words", "--sample", corpus)["words"]["sample"]
    assert sample["windows"] == sample["tokens"]
    assert 0 < sample["composed"] <= sample["windows"] - sample["found"]


def test_update_with_text_and_with_traffic(made, tmp_path):
    news = tmp_path / "news.txt"
    news.write_text("\n".join(sentences(40, seed=23)))
    before = shown(made, "--sample", news)["cells"]
    done = hmi("domain", "update", made, "cells", "--corpus", news, "--max-share", 0.9, "--json")
    assert done.returncode == 0, done.stderr
    updated = json.loads(done.stdout)
    assert updated["texts"] == 40 and updated["generation"] > before["generation"]
    assert updated["promoted"] > 0
    assert shown(made, "--sample", news)["cells"]["sample"]["share"] > before["sample"]["share"]

    keys = hmi_kernels.ngram_keys(torch.tensor([[5, 6, -1]], dtype=torch.int32))
    with Store.open(made) as opened:
        counts = TrafficCounts(
            keys, torch.ones(1, dtype=torch.float64), 1.0, 0.0, tokens=120, windows=119, hits=60
        )
        opened.save_traffic("cells", counts)
    assert shown(made)["cells"]["waiting_tokens"] == 120
    assert "120 tokens of traffic wait" in hmi("domain", "show", made).stdout
    told = hmi("domain", "update", made, "cells", "--half-life-tokens", 1000, "--max-promotions", 1)
    assert told.returncode == 0 and "120 tokens of traffic taken in" in told.stdout
    assert shown(made)["cells"]["waiting_tokens"] == 0


def test_update_with_a_smaller_budget(made):
    done = hmi("domain", "update", made, "words", "--plot-bytes", "16KiB", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plot_bytes"] == 16 << 10
    assert json.loads(done.stdout)["demoted"] > 0


@pytest.mark.parametrize("option", ["--half-life-tokens", "--max-share"])
@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_numbers_that_make_no_sense_are_refused_before_anything_is_opened(option, value, tmp_path):
    told = hmi("domain", "update", tmp_path, "cells", option, value)
    assert told.returncode == 2
    assert "Invalid value" in told.stderr and option in told.stderr


def test_move(made):
    before = shown(made)["cells"]["rows"]
    done = hmi("domain", "move", made, "cells", "--parent", "general")
    assert done.returncode == 0 and "moved domain cells under general" in done.stdout
    after = shown(made)["cells"]
    assert after["parent"] == "general" and after["rows"] > before, "rows of words are its own now"
    cycle = hmi("domain", "move", made, "general", "--parent", "cells")
    assert cycle.returncode == 2 and "error:" in cycle.stderr


def test_own_layers_and_back(made, tiny_bert, tmp_path):
    from transformers import BertModel

    encoder = BertModel.from_pretrained(tiny_bert).encoder
    file = tmp_path / "layers.safetensors"
    save_file({f"bert.encoder.{name}": 1.01 * value for name, value in encoder.state_dict().items()}, file)
    given = hmi("domain", "layers", made, "words", file, "--json")
    assert given.returncode == 0, given.stderr
    assert json.loads(given.stdout)["own_layers"] is True
    assert "own domain layers" in hmi("domain", "show", made).stdout
    assert hmi("domain", "layers", made, "words", "--inherit").returncode == 0
    assert shown(made)["words"]["own_layers"] is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "x", "--corpus", "-", "--row-format", "int4"), "float32, float16, int8"),
        (("add", "x", "--corpus", "-", "--stdin-format", "csv"), "txt, jsonl"),
        (("update", "nobody"), "nobody"),
        (("move", "cells", "--parent", "nobody"), "nobody"),
        (("layers", "words"), "--inherit"),
        (("layers", "words", "absent.safetensors"), "absent.safetensors"),
        (("show", "nobody"), "nobody"),
        (("show", "--sample", "absent.txt"), "absent.txt"),
    ],
)
def test_errors_are_told(made, arguments, said):
    command, *others = arguments
    done = hmi("domain", command, made, *others)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr


def test_run_under_a_budget_and_with_traffic_recorded(made, tmp_path):
    records = [{"text": text, "label": "yes" if "cell" in text else "no"} for text in sentences(40)]
    data = write_jsonl(tmp_path / "train.jsonl", records)
    trained = hmi("tenant", "train", made, "acme", "--data", data, "--domain", "cells", "--epochs", 1)
    assert trained.returncode == 0, trained.stderr
    line = json.dumps({"tenant": "acme", "text": "the cell"}) + "\n"
    done = hmi("run", made, "--miss", "budget", "--exact-budget", 0.5, text=line)
    assert done.returncode == 0 and "scores" in json.loads(done.stdout)
    assert hmi("run", made, "--miss", "budgets", text=line).returncode == 2
    assert shown(made)["cells"]["waiting_tokens"] == 0, "nothing is recorded unless it is asked for"
    assert hmi("run", made, "--record-traffic", text=3 * line).returncode == 0
    assert shown(made)["cells"]["waiting_tokens"] == 3 * 4, "with the special tokens"


def test_a_corpus_of_several_files_as_a_shell_expands_them(made, tmp_path):
    files = [tmp_path / f"part{number}.txt" for number in range(3)]
    for seed, file in enumerate(files):
        file.write_text("\n".join(sentences(30, seed=20 + seed)))
    done = hmi("domain", "add", made, "parts", "--corpus", *files, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["texts"] == 90
    done = hmi("domain", "update", made, "words", "--corpus", *files, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["texts"] == 90
