"""docs/layers.md: its blocks run one after another, and print what their comments say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import torch

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "layers.md").read_text()


def test_the_blocks_of_the_page_run() -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(block, names)
    assert printed.getvalue().split() == ["True"]
    x, back = names["x"], names["back"]
    assert isinstance(x, torch.Tensor) and isinstance(back, torch.Tensor)
    assert torch.allclose(x, back, atol=1e-2)  # rtol is 1e-4, both ways
