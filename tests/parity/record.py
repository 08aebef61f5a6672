"""`make parity`: send every case to trio-core, record its answers, and print every difference of the sidecar."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from cases import DETECTOR_ROWS, DIFFERENCES, Case, all_cases, refusing, saying  # noqa: E402
from comparing import Provider, outcomes  # noqa: E402
from running import running  # noqa: E402
from tiny_onnx import yolov10  # noqa: E402
from trio_core_process import environ_of, trio_core  # noqa: E402

EXPECTED = HERE / "expected.json"


async def main(python: str) -> None:
    cases = all_cases()
    with tempfile.TemporaryDirectory() as folder:
        detector = yolov10(Path(folder) / "detector.onnx", DETECTOR_ROWS)
        await _record(python, str(detector), cases)


async def _record(python: str, detector: str, cases: list[Case]) -> None:
    async with Provider() as provider:
        url = f"{provider.origin}/v1"
        async with trio_core(python, remote_vlm_url=url, yolo_model=detector) as (trio_core_url, _):
            trio_core_answers = await outcomes(trio_core_url, provider, cases)
        async with running(dashscope_url=url, detector_model=detector) as sidecar:
            sidecar_answers = await outcomes(sidecar.url, provider, cases)
            await _check_trio_core_in_front(python, sidecar.url, provider)
    recorded = {case.name: {"digest": case.digest, **trio_core_answers[case.name]} for case in cases}
    lines = (f"{json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in recorded.items())
    EXPECTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    different = [case for case in cases if sidecar_answers[case.name] != trio_core_answers[case.name]]
    for case in different:
        print(f"{case.name}: {DIFFERENCES.get(case.differs, 'NOT MEANT')}")
        for name, outcome in (("trio-core", trio_core_answers), ("sidecar", sidecar_answers)):
            print(f"  {name:9} {json.dumps(outcome[case.name])[:600]}")
    intended = {case.name for case in cases if case.differs}
    unintended = {case.name for case in different} ^ intended
    print(f"{len(cases)} requests, {len(different)} answered differently, {len(unintended)} of them not as listed")
    sys.exit(bool(unintended))


async def _check_trio_core_in_front(python: str, url: str, provider: Provider) -> None:
    """Check trio-core in front of a sidecar: trio-core must not see the provider's throttling refusals."""
    refusal = refusing(429, "limit_requests", "slow down")
    provider.says = [refusal, refusal, refusal, saying("A gate.")]
    settings = {"remote_vlm_url": f"{url}/v1", "remote_vlm_model": "in-front"}
    process = await asyncio.create_subprocess_exec(
        python, str(HERE / "in_front.py"), env=environ_of(settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    async with asyncio.timeout(120):
        out, err = await process.communicate()
    print(f"trio-core in front of the sidecar: {out.decode().strip() or err.decode()[-1000:]}")
    if json.loads(out) != {"whole": "A gate.", "video": "A gate.", "streamed": "A gate."}:
        sys.exit("trio-core in front of the sidecar was not answered")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
