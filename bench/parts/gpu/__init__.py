"""The items that gpu.sh runs, and how their compiled module gets there."""
