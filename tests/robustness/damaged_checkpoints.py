"""Checkpoints that got damaged, or were made to do damage: loaded and used, or refused."""

import json
import math
import os
import pickle
import shutil
import struct
import traceback
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tadsr import TADSRError, TADSRPipeline

from .mutations import mutate

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
_EVENTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
_ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 0.5, 10**6, 10**9, 10**12, 2**63, math.nan, math.inf, -1e308),
    *("", "x", "../../x", "owner/name", "os.system", [], [[]], [1] * 9, {}, {"a": {}}, "\0"),
)


def make_checkpoint(folder: Path) -> dict[str, bytes]:
    """Return the files of a small published checkpoint and of a native one made of it."""
    shutil.copytree(GOLDEN / "base", folder / "official")
    shutil.copy(GOLDEN / "tadsr.pkl", folder / "official")
    pipe = TADSRPipeline.from_pretrained(folder / "official", merge_adapters=False)
    pipe.save_pretrained(folder / "native")
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def run_case(files: dict[str, bytes], folder: Path, rng: Random) -> dict[str, str]:
    """Damage one file, load, make a picture, and clean up unless it went wrong."""
    name = rng.choice(sorted(files))
    kind = name.partition("/")[0]
    root, canary = folder / "in", folder / "executed"
    for other, data in files.items():
        if other.startswith(kind):
            (root / other).parent.mkdir(parents=True, exist_ok=True)
            (root / other).write_bytes(data)
    (root / name).write_bytes(_damaged(rng, name, files, canary))
    if rng.random() < 0.03:
        (root / name).unlink()
    events: list[str] = []
    _listeners[:] = [events]
    wrong = ""
    try:
        pipe = TADSRPipeline.from_pretrained(root / kind)
        pipe(np.full((8, 8, 3), 99, np.uint8), 10**3 // 2, process_size=0)
        became = "upscaled"
    except Exception as error:
        became = type(error).__name__
        wrong = "" if isinstance(error, TADSRError) else traceback.format_exc()
    _listeners[:] = []
    if events or canary.exists():
        wrong = f"was executed: {events}"
    if not wrong:
        shutil.rmtree(root)
    return {"file": name, "became": became, "wrong": wrong}


_listeners: list[list[str]] = []


def listen(event: str, arguments: tuple) -> None:
    if event in _EVENTS and _listeners:
        _listeners[0].append(f"{event} {arguments}")


class _Executed:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.canary),)


def _damaged(rng: Random, name: str, files: dict[str, bytes], canary: Path) -> bytes:
    data, draw = files[name], rng.random()
    if draw < 0.05:
        return pickle.dumps(_Executed(canary))
    if draw < 0.1:
        return files[rng.choice(sorted(files))]
    if name.endswith(".json") and draw < 0.8:
        return json.dumps(_edited(rng, json.loads(data))).encode()
    if name.endswith(".safetensors") and draw < 0.6:
        length = struct.unpack_from("<Q", data)[0]
        header = json.dumps(_edited(rng, json.loads(data[8 : 8 + length]))).encode()
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    return mutate(rng, data, list(files.values()))


def _edited(rng: Random, document: Any) -> Any:
    """Change, drop or add one or two entries, at any depth."""
    for _ in range(rng.choice((1, 1, 2))):
        place = document
        while isinstance(place, dict | list) and place:
            key = (
                rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
            )
            if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
                place = place[key]
                continue
            if rng.random() < 0.15:
                del place[key]
            else:
                place[key] = rng.choice(_ODD)
            break
    return document
