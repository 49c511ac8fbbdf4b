"""How gradients flow through a solve: one file a mode, registered by name where the public functions look them up."""
