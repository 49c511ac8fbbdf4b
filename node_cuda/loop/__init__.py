"""The loop over steps on the host, and what is made of its steps: outputs, events, dense output."""
