"""The user's input, checked once: the field, the times, the state."""
