"""Loads folders with the `adapters` library and computes: what HMI exported must give what was recorded.

    python load.py OUT RECORDED FOLDER...

Runs in the environment of ``record.py``. Each folder has the name of a recorded case; ``OUT`` gets the logits
for K = 0 as in the record. Missing and unexpected tensors are errors.
"""

import json
import sys
from pathlib import Path

import torch
from adapters import BertAdapterModel
from safetensors.torch import save_file


@torch.no_grad()
def main(out: Path, recorded: Path, folders: list[Path]) -> None:
    """Loads each folder onto the recorded base model, and computes the recorded inputs."""
    inputs = json.loads((recorded / "inputs.json").read_text())["input_ids"]
    logits = {}
    for folder in folders:
        model = BertAdapterModel.from_pretrained(recorded / "base")
        loading: dict[str, list[str]] = {}
        name = model.load_adapter(str(folder), use_safetensors=True, set_active=True, loading_info=loading)
        problems = [*loading["missing_keys"], *loading["unexpected_keys"]]
        unexplained = [key for key in problems if f".{name}." in key]
        if unexplained or model.active_head != name:
            raise SystemExit(f"{folder}: {unexplained} {model.active_head}")
        model.eval()
        for number, ids in enumerate(inputs):
            logits[f"{folder.name}.k0.{number}"] = model(input_ids=torch.tensor([ids])).logits[0].contiguous()
    save_file(logits, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(argument) for argument in sys.argv[3:]])
