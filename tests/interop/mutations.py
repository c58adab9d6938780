"""Ways in which a folder can be wrong: of its JSON, value by value, and of its safetensors, byte by byte."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WRONG_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, -(2**63), 10**30, 0.5, -0.0, 1e308, math.inf, math.nan, "", "x",
    "8",    "../../outside", "/etc/hostname", "a\0b",
    "\ud800", "é" * 300, "(a|a)*b", "all-linear", [], [None], [-1, 10**9], ["query"],
    ["../x"], {}, {"default": 4}, {"0": -1}, {"a": {"b": []}}, [[[[]]]],
]  # fmt: skip

SETTINGS = ("adapter_config.json", "head_config.json")
TENSORS = ("adapter_model.safetensors", "adapter.safetensors", "model_head.safetensors")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value below the root."""
    entries = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any = None, *, remove: bool = False) -> Any:
    """A copy with another value at ``path``, or without it."""
    copy = json.loads(json.dumps(value))
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    if remove:
        del parent[path[-1]]
    else:
        parent[path[-1]] = new
    return copy


def write_json(path: Path, value: Any) -> None:
    """Also what is no JSON in the strict sense, such as NaN, as Python writes it."""
    path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))


def mutate(folder: Path, random: Random) -> str:
    """Makes one to three changes in a folder; returns what they were."""
    made = []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        files = [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
        if not files:
            break
        path = random.choice(sorted(files))
        changes = [_flip_bytes, _cut, _lengthen, _replace_by_other]
        changes += [_change_value] * 8 if path.name in SETTINGS else [_change_header, _change_tensor] * 4
        change = random.choice(changes)
        made.append(f"{change.__name__}({path.name})")
        change(path, random)
    return ", ".join(made)


def _flip_bytes(path: Path, random: Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(random.randint(1, 8)):
        content[random.randrange(len(content))] = random.randrange(256)
    path.write_bytes(content)


def _cut(path: Path, random: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: random.randrange(len(content))] or b"{")


def _lengthen(path: Path, random: Random) -> None:
    path.write_bytes(path.read_bytes() + random.randbytes(random.randint(1, 64)))


def _replace_by_other(path: Path, random: Random) -> None:
    path.unlink()
    match random.randrange(4):
        case 0:
            path.mkdir()
        case 1:
            path.symlink_to("/dev/zero")
        case 2:
            path.symlink_to(path.name)  # a link to itself


def _change_value(path: Path, random: Random) -> None:
    try:
        value = json.loads(path.read_bytes())
        place = random.choice(list(places(value)))
    except (ValueError, IndexError, RecursionError):
        return _flip_bytes(path, random)
    match random.randrange(5):
        case 0:
            value = changed(value, place, remove=True)
        case 1:
            other = random.choice(list(places(value)))
            moved = value
            for key in other:
                moved = moved[key]
            value = changed(value, place, moved)
        case _:
            value = changed(value, place, random.choice(WRONG_VALUES))
    return write_json(path, value)


def _change_header(path: Path, random: Random) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        place = random.choice(list(places(header)))
    except (ValueError, IndexError, RecursionError):
        return _flip_bytes(path, random)
    match random.randrange(4):
        case 0:
            length = random.choice([0, 1, 7, len(content), 10**8, 2**63, 2**64 - 1])
            path.write_bytes(length.to_bytes(8, "little") + content[8:])
            return None
        case 1:
            header = changed(header, place, remove=True)
        case _:
            header = changed(header, place, random.choice(WRONG_VALUES))
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return None


def _change_tensor(path: Path, random: Random) -> None:
    try:
        tensors = load_file(path)
        name = random.choice(sorted(tensors))
    except Exception:  # an earlier change broke the file
        return _flip_bytes(path, random)
    tensor = tensors.pop(name)
    match random.randrange(8):
        case 0:
            pass
        case 1:
            tensors[name] = tensor.mT.contiguous() if tensor.dim() > 1 else tensor[:, None]
        case 2:
            tensors[name] = tensor.reshape(-1)
        case 3:
            tensors[name] = tensor.to(random.choice([torch.float64, torch.int32, torch.uint8, torch.bool]))
        case 4:
            tensors[name] = torch.full_like(tensor, random.choice([math.nan, math.inf, -math.inf, 3e38]))
        case 5:
            tensors[f"{name}.more"] = tensor
        case 6:
            tensors[name] = tensor[:0]
        case 7:
            tensors[name.replace(".layer.1.", f".layer.{random.choice([99, 10**6, -1])}.")] = tensor
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return None


def copy_folder(source: Path, target: Path) -> Path:
    """A fresh copy, whatever was there."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))
