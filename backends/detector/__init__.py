"""Object detection with a YOLO or RT-DETR model in this process, for `POST /api/inference/detect`."""

from backends.detector.backend import DetectorBackend

__all__ = ["DetectorBackend"]
