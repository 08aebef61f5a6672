"""The backends: the code that communicates with models. It never imports `sidecar`.

Each backend can therefore be used, tested and replaced without the sidecar.
"""
