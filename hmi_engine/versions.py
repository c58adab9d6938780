"""Versions of the software that takes part in what is computed."""

import platform
from importlib.metadata import PackageNotFoundError, version

from pydantic import BaseModel, ConfigDict

__all__ = ["PACKAGES", "Versions", "installed_versions"]

PACKAGES = (
    "duckdb",
    "faiss-cpu",
    "hmi",
    "numba",
    "numpy",
    "peft",
    "ray",
    "safetensors",
    "scikit-learn",
    "scipy",
    "seqeval",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
    "zstandard",
)
"""What takes part in what is computed, or is measured beside it."""


class Versions(BaseModel):
    """Version of Python, and of each installed package that took part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    python: str
    packages: dict[str, str]


def installed_versions() -> Versions:
    """Versions of what is installed here."""
    found = {package: _version(package) for package in PACKAGES}
    present = {package: number for package, number in found.items() if number is not None}
    return Versions(python=platform.python_version(), packages=present)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
