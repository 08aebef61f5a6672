"""What is reported: metrics, gauges, time series, traces, log lines."""
