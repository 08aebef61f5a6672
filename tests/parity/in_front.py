"""Run trio-core's own engine, whole and streaming, with a sidecar as its remote URL. Run this in trio-core's Python."""

from __future__ import annotations

import asyncio
import json

import numpy as np
from trio_core.config import EngineConfig
from trio_core.engine import TrioCore

engine = TrioCore(EngineConfig())
engine.load()
video = np.random.default_rng(1).random((4, 3, 64, 64), dtype=np.float32)


async def streamed() -> str:
    pieces = [piece async for piece in engine.stream_analyze(video, "What goes on?")]
    return "".join(str(piece.get("text", "")) for piece in pieces)


answers = {
    "whole": engine.analyze_frame(video[0], "What goes on?").text,
    "video": engine.analyze_video(video, "What goes on?").text,
    "streamed": asyncio.run(streamed()),
}
print(json.dumps(answers))
