"""Which installed modules document which topic: the demo's domains and the groups inside each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["BACKGROUND_MODULES", "TOPICS", "Topic"]


@dataclass(frozen=True)
class Topic:
    """A domain of documentation.

    Attributes:
        name: the domain's name.
        groups: group -> modules (as in :func:`hmi_engine.demo.docstrings.source_files`). The group that a
            text's module is listed in is the text's label; modules that are not installed are passed over.
    """

    name: str
    groups: Mapping[str, tuple[str, ...]]


def _topic(name: str, **groups: str) -> Topic:
    return Topic(name, {group: tuple(modules.split()) for group, modules in groups.items()})


TOPICS: tuple[Topic, ...] = (
    _topic(
        "networking",
        concurrency="asyncio anyio concurrent",
        email="email smtplib imaplib poplib mailbox nntplib smtpd mimetypes",
        web=(
            "http urllib xmlrpc wsgiref cgi webbrowser httpx httpcore httpx2 httpcore2 h11 requests urllib3 "
            "huggingface_hub/hf_api huggingface_hub/utils huggingface_hub/file_download"
        ),
        sockets=(
            "socket socketserver ssl selectors asyncore asynchat ftplib telnetlib ipaddress multiprocessing"
        ),
        clusters="torch/distributed",
    ),
    _topic(
        "formats",
        markup="xml html plistlib markdown_it bs4 lxml",
        archives="tarfile zipfile gzip bz2 lzma shutil zipimport fsspec",
        records=(
            "json pickle pickletools copyreg shelve csv configparser tomllib yaml dataclasses pydantic "
            "safetensors sqlite3 dbm"
        ),
        media="wave aifc sunau imghdr sndhdr colorsys PIL",
    ),
    _topic(
        "text",
        terminal="rich typer click argparse optparse cmd curses getopt pprint textwrap readline tqdm",
        syntax="ast tokenize lib2to3 pygments pyparsing idlelib inspect symtable",
        templates="jinja2 string difflib gettext locale codecs",
        tokenization=(
            "tokenizers transformers/tokenization_utils_base transformers/tokenization_python "
            "transformers/tokenization_utils transformers/tokenization_utils_fast "
            "transformers/models/bert transformers/models/t5 transformers/models/gpt2 "
            "transformers/models/roberta transformers/models/llama transformers/models/deberta_v2 "
            "transformers/models/albert transformers/models/xlnet transformers/models/bart regex re"
        ),
    ),
    _topic(
        "numerics",
        arrays="numpy",
        learning="torch/nn torch/optim torch/distributions torch/functional",
        algebra="sympy/core sympy/functions sympy/matrices mpmath",
        graphs="networkx/algorithms networkx/classes networkx/generators",
        statistics="statistics random fractions decimal _pydecimal numbers sklearn/metrics",
    ),
)

BACKGROUND_MODULES: tuple[str, ...] = (
    "torch",
    "transformers",
    "sympy",
    "scipy",
    "sklearn",
    "accelerate",
    "sentence_transformers",
    "pip",
    "setuptools",
)
"""Further packages whose text has no label: it widens the table of the domains' common parent."""
