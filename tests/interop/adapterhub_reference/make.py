"""Makes an environment for the `adapters` library, and records there what the library computes.

    python tests/interop/adapterhub_reference/make.py [--out FOLDER] [--environment FOLDER]

installs `adapters` 1.3.0 with the transformers that it wants and this environment's version of torch in an
environment of its own (a temporary one, or FOLDER, used again if it is there) and runs ``record.py``.
The default ``--out`` is ``recorded/`` beside this file, which is what the tests compare with.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
RECORDED = HERE / "recorded"
REQUIREMENTS = ("adapters==1.3.0", f"torch=={version('torch').partition('+')[0]}", "safetensors")


def make_environment(folder: Path) -> Path:
    """Returns the Python of an environment with the library, made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
    return python


def record(python: Path, out: Path) -> None:
    """Runs ``record.py`` in the environment, without this one's paths and without the network."""
    out.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    subprocess.run([python, HERE / "record.py", out.resolve()], check=True, env=kept | offline)


def main() -> None:
    """Reads the options and records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RECORDED, help="where the record goes")
    parser.add_argument("--environment", type=Path, help="kept and used again; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        record(make_environment(options.environment or Path(temporary) / "environment"), options.out)


if __name__ == "__main__":
    main()
