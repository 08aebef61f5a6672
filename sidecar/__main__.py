"""`python -m sidecar` is `vlm-sidecar`."""

from .cli import main

if __name__ == "__main__":
    main()
