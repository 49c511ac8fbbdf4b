"""The launches that kernels.py times."""
