"""What the user asks for, checked once: the field, the times, the state."""
