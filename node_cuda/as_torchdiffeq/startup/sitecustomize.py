"""Python runs this file when a process starts with its folder on PYTHONPATH.

It installs node_cuda in the place of torchdiffeq when torchdiffeq is first imported; other processes import nothing.
"""

import importlib.machinery
import importlib.util
import os
import sys

FOLDER = os.environ.get("NODE_CUDA_AS_TORCHDIFFEQ")


class OnFirstImport:
    """Installs node_cuda under the name of torchdiffeq when that is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchdiffeq":
            return None
        sys.meta_path.remove(self)
        assert FOLDER is not None
        sys.path.insert(0, FOLDER)  # the node_cuda of the process that started this one
        try:
            from node_cuda.as_torchdiffeq.install import install_as_torchdiffeq
        finally:
            sys.path.remove(FOLDER)
        install_as_torchdiffeq()
        return sys.modules[name].__spec__


def run_next():
    """Run the sitecustomize that Python would have run without this one, if there is one."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [path for path in sys.path if os.path.abspath(path) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if FOLDER is not None:
    sys.meta_path.insert(0, OnFirstImport())
run_next()
