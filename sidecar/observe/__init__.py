"""Reports what the sidecar does: metrics, gauges, time series, traces and log lines."""
