"""All metadata is in pyproject.toml; a compiled extension module, once there is one, is declared here."""

from setuptools import setup

setup()
