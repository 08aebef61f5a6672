"""Write small real ONNX models with known outputs. The few lines of protobuf here replace the onnx package.

The field numbers are those of onnx.proto3 (github.com/onnx/onnx).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FLOAT = 1


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _message(*fields: tuple[int, int | str | bytes]) -> bytes:
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += _varint(number << 3 | 2) + _varint(len(data)) + data
    return out


def _tensor(name: str, shape: Sequence[int], values: Sequence[float]) -> bytes:
    dims = [(1, side) for side in shape]
    return _message(*dims, (2, FLOAT), (8, name), (9, struct.pack(f"<{len(values)}f", *values)))


def _value(name: str, shape: Sequence[int]) -> bytes:
    dims = _message(*[(1, _message((1, side))) for side in shape])
    return _message((1, name), (2, _message((1, _message((1, FLOAT), (2, dims))))))


def _node(kind: str, inputs: Sequence[str], output: str, **ints: int) -> bytes:
    attributes = [(5, _message((1, name), (3, value), (20, 2))) for name, value in ints.items()]
    return _message(*[(1, name) for name in inputs], (2, output), (4, kind), *attributes)


def save(path: Path, outputs: dict[str, tuple[Any, Any]], side: int = 64) -> Path:
    """Write a model and return its path. Each output is `constant + factor * brightness`.

    `brightness` is the mean of all pixels of the frame, from 0 to 1. `outputs` maps a name to (constant, factor).
    Both are nested lists of two dimensions; the batch dimension is added.
    """
    nodes, tensors, values = [_node("ReduceMean", ["image"], "brightness", keepdims=0)], [], []
    for name, (constant, factor) in outputs.items():
        shape = (1, len(constant), len(constant[0]))
        tensors.append(_tensor(f"{name} constant", shape, [value for row in constant for value in row]))
        tensors.append(_tensor(f"{name} factor", shape, [value for row in factor for value in row]))
        nodes.append(_node("Mul", [f"{name} factor", "brightness"], f"{name} part"))
        nodes.append(_node("Add", [f"{name} constant", f"{name} part"], name))
        values.append(_value(name, shape))
    graph = _message(
        *[(1, node) for node in nodes], (2, "tiny"), *[(5, tensor) for tensor in tensors],
        (11, _value("image", (1, 3, side, side))), *[(12, value) for value in values],
    )  # fmt: skip
    path.write_bytes(_message((1, 8), (7, graph), (8, _message((2, 13)))))
    return path


def yolov10(path: Path, rows: Sequence[Sequence[float]]) -> Path:
    """Write a model with these rows: x1, y1, x2, y2, score, class in pixels of a 64 x 64 input.

    For a black frame, every score is half as high.
    """
    constant = [[*row[:4], row[4] / 2, row[5]] for row in rows]
    factor = [[0, 0, 0, 0, row[4] / 2, 0] for row in rows]
    return save(path, {"output0": (constant, factor)})
