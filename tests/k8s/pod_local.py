"""Run the overlay `local-gpu` without a GPU: podman runs it with a tiny model on the volume. `make test-pod-local`."""

from __future__ import annotations

from pathlib import Path

from playing import playable, playing, podman
from rendering import K8S, container
from running import samples

from sidecar import __version__

IMAGE = f"localhost/vlm-sidecar:{__version__}-local"
#: The podman volume that takes the place of the volume claim of the same name.
VOLUME = "vlm-model"


def test_a_pod_answers_from_a_model_on_its_volume(tmp_path: Path) -> None:
    pod, *maps = playable(K8S / "overlays" / "local-gpu", IMAGE)
    del container(pod["spec"], "vlm-sidecar")["resources"]["limits"]["nvidia.com/gpu"]
    podman("volume", "rm", "--force", VOLUME)  # a killed test may have left a volume
    podman("volume", "create", VOLUME)
    try:
        build = ("-m", "backends.local.tiny", "idefics3", "/models/vlm")
        options = ("--rm", "--network=none", f"--volume={VOLUME}:/models/vlm:U", "--entrypoint=python")
        podman("run", *options, IMAGE, *build)
        with playing([pod, *maps], tmp_path) as pod_running:
            found = samples(pod_running.get("/metrics"))
            assert found['sidecar_batch_size_count{backend="local"}'] > 0
            assert found['sidecar_backend_lock_wait_seconds_sum{backend="local"}'] > 0
            assert pod_running.stop("cortex") == 0
            assert '"lost": 0' in pod_running.log("cortex")
            assert pod_running.stop("vlm-sidecar") == 0
    finally:
        podman("volume", "rm", VOLUME)
