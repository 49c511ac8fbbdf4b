"""The loop over steps on the host, and what a solve computes from the steps: outputs, events, dense output."""
