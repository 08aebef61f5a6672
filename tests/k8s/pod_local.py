"""The overlay `local-gpu` but for the card: podman plays it with a tiny model on the volume. `make test-pod-local`."""

from __future__ import annotations

from pathlib import Path

from playing import playable, playing, podman
from rendering import K8S, container
from running import samples

IMAGE = "localhost/vlm-sidecar:0.1.0-local"
#: Podman's volume for the claim of the same name.
VOLUME = "vlm-model"


def test_a_pod_answers_from_a_model_on_its_volume(tmp_path: Path) -> None:
    pod, *maps = playable(K8S / "overlays" / "local-gpu", IMAGE)
    del container(pod["spec"], "vlm-sidecar")["resources"]["limits"]["nvidia.com/gpu"]
    podman("volume", "rm", "--force", VOLUME)  # one of a test that was killed may be there
    podman("volume", "create", VOLUME)
    try:
        build = ("-m", "backends.local.tiny", "idefics3", "/models/vlm")
        options = ("--rm", "--network=none", f"--volume={VOLUME}:/models/vlm:U", "--entrypoint=python")
        podman("run", *options, IMAGE, *build)
        with playing([pod, *maps], tmp_path) as played:
            found = samples(played.get("/metrics"))
            assert found['sidecar_batch_size_count{backend="local"}'] > 0
            assert found['sidecar_backend_lock_wait_seconds_sum{backend="local"}'] > 0
            assert played.stop("cortex") == 0
            assert '"lost": 0' in played.log("cortex")
            assert played.stop("vlm-sidecar") == 0
    finally:
        podman("volume", "rm", VOLUME)
