"""Harvesting documentation strings: what is read, how it is split, and that the split holds."""

import ast
import inspect
import json
from itertools import product
from pathlib import Path

import pytest

from hmi_engine.demo.docstrings import read_docstrings, source_files
from hmi_engine.demo.documentation import CORPUS_WORDS, MIN_GROUP_PASSAGES, Documentation, harvest
from hmi_engine.demo.near_duplicates import NearDuplicates
from hmi_engine.demo.topics import TOPICS, Topic

STANDARD_TOPIC = Topic("standard", {"email": ("email", "mailbox"), "network": ("asyncio", "http")})


@pytest.fixture(scope="module")
def standard() -> Documentation:
    return harvest([STANDARD_TOPIC], background_modules=("unittest", "logging"), max_words=30)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_docstrings_are_those_that_inspect_sees() -> None:
    path = Path(inspect.getsourcefile(json.JSONDecoder) or "")
    found = {docstring.prose: docstring.kind for docstring in read_docstrings(path, "json/decoder.py")}
    of_class = " ".join((inspect.getdoc(json.JSONDecoder) or "").split())
    of_method = " ".join((inspect.getdoc(json.JSONDecoder.raw_decode) or "").split())
    assert found[of_class] == "class"
    assert found[of_method] == "method"


def test_kinds_examples_and_nested_functions(tmp_path: Path) -> None:
    source = '''
async def fetch():
    """Fetches a page.

    >>> fetch()
    'page'

    Raises nothing."""
    def inner():
        """Never documented outside."""
class Page:
    """A page."""
    class Part:
        "A part."
    @property
    def size(self):
        """Its size."""
    def undocumented(self): ...
'''
    docstrings = read_docstrings(write(tmp_path / "page.py", source), "page.py")
    assert [(docstring.prose, docstring.kind) for docstring in docstrings] == [
        ("Fetches a page. Raises nothing.", "function"),
        ("A page.", "class"),
        ("A part.", "class"),
        ("Its size.", "method"),
    ]


@pytest.mark.parametrize("content", [b"def broken(:", b"\x00", b"print 'old'", b"\xff\xfe bad"])
def test_unreadable_source_gives_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.py"
    path.write_bytes(content)
    assert read_docstrings(path, "odd.py") == []
    assert read_docstrings(tmp_path / "missing.py", "missing.py") == []


def test_source_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    source = f'"""Module."""\nopen({str(marker)!r}, "w")\ndef f():\n    """Does nothing at all."""\n'
    assert len(read_docstrings(write(tmp_path / "evil.py", source), "evil.py")) == 1
    assert not marker.exists()


def test_source_files_are_sorted_and_without_tests(tmp_path: Path) -> None:
    for name in ("b/z.py", "b/a.py", "b/tests/test_a.py", "b/_vendor/c.py", "single.py"):
        write(tmp_path / name, "")
    other = tmp_path / "other"
    write(other / "b" / "shadowed.py", "")
    assert [source for _, source in source_files("b", [tmp_path, other])] == ["b/a.py", "b/z.py"]
    assert [source for _, source in source_files("single", [tmp_path])] == ["single.py"]
    assert source_files("absent", [tmp_path]) == []


def test_near_duplicates_against_a_plain_count() -> None:
    first = "the quick brown fox jumps over the lazy dog"
    near = "The quick brown fox jumps over the lazy cat, 42!"
    words = near.lower().replace(",", "").split()[:9]
    shingles = {tuple(words[i : i + 4]) for i in range(6)}
    of_first = {tuple(first.split()[i : i + 4]) for i in range(6)}
    share = len(shingles & of_first) / len(shingles)
    for threshold in (share - 0.01, share + 0.01):
        known = NearDuplicates(share=threshold)
        assert known.admit(first)
        assert known.contains(near) == (threshold < share)
    assert NearDuplicates().contains("1234 ---")


def test_split_is_by_file_and_without_near_copies(standard: Documentation) -> None:
    (topic,) = standard.topics
    assert {passage.group for passage in topic.train} == {"email", "network"}
    assert not {passage.source for passage in topic.train} & {passage.source for passage in topic.test}
    held_out = NearDuplicates()
    for passage in topic.test:
        assert held_out.admit(passage.text)
    assert not any(held_out.contains(passage.text) for passage in topic.train)
    assert not any(held_out.contains(text) for text in (*topic.corpus, *standard.background))


def test_corpus_holds_the_training_passages_and_no_long_text(standard: Documentation) -> None:
    (topic,) = standard.topics
    assert {passage.text for passage in topic.train} <= set(topic.corpus)
    assert max(len(text.split()) for text in topic.corpus) <= CORPUS_WORDS
    assert max(len(passage.text.split()) for passage in topic.train + topic.test) <= 30
    assert standard.background


def test_harvest_is_deterministic_and_seeded(standard: Documentation) -> None:
    arguments = {"background_modules": ("unittest", "logging"), "max_words": 30}
    assert harvest([STANDARD_TOPIC], **arguments) == standard
    other = harvest([STANDARD_TOPIC], seed=1, **arguments)
    sources = [{passage.source for passage in found.topics[0].test} for found in (standard, other)]
    assert sources[0] != sources[1]


def test_background_stops_at_its_limit() -> None:
    arguments = {"background_modules": ("unittest", "logging", "asyncio")}
    full = harvest([STANDARD_TOPIC], **arguments).background
    cut = harvest([STANDARD_TOPIC], background_words=1000, **arguments).background
    assert cut == full[: len(cut)]
    assert 0 < sum(len(text.split()) for text in cut) < 2000


def test_small_and_absent_groups_are_left_out(tmp_path: Path) -> None:
    words = ["".join(letters) for letters in product("abcdefgh", repeat=4)]
    chunks = [" ".join(words[i : i + 8]) for i in range(0, len(words), 8)]
    for number in range(10):
        texts = chunks[number * 10 : number * 10 + 10]
        source = "\n".join(f'def f{i}():\n    """{text}"""' for i, text in enumerate(texts))
        ast.parse(source)
        write(tmp_path / "big" / f"m{number}.py", source)
    write(tmp_path / "small.py", f'def f():\n    """{chunks[200]}"""')
    topic = Topic("t", {"big": ("big",), "small": ("small",), "absent": ("nowhere",)})
    (result,) = harvest([topic], background_modules=(), roots=[tmp_path]).topics
    assert {passage.group for passage in (*result.train, *result.test)} == {"big"}
    assert len(result.train) >= MIN_GROUP_PASSAGES
    assert len(result.train) + len(result.test) == 100


def test_topics_are_well_formed() -> None:
    assert len(TOPICS) >= 4
    listed = [
        (topic.name, module) for topic in TOPICS for modules in topic.groups.values() for module in modules
    ]
    assert len({module for _, module in listed}) == len(listed)
