"""Which page shows the results of which benchmark, and the text that it shows.

A page has blocks between `<!-- bench:NAME -->` and `<!-- /bench -->`; report.py fills them from the JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from parts.common.paths import BENCH, EXAMPLES, PUBLISHED, ROOT
from parts.common.tables import Result
from parts.compiled.report import compiled_block, compiled_sentence, compiled_short
from parts.device_loop.report import device_loop_block
from parts.endurance.report import endurance_block
from parts.examples.report import examples_block
from parts.gpu.report import gpu_block
from parts.gradients.report import gradient_costs, gradients_block
from parts.kernels.report import kernels_block
from parts.losses import losses_block
from parts.memory.report import memory_block, memory_short
from parts.methods.report import grids_block, methods_block
from parts.peers.report import peers_block
from parts.solve.report import solve_block
from parts.speed.report import small_block, speed_block, speed_short
from parts.stiff.report import stiff_block

PAGES = (
    ROOT / "README.md",
    BENCH / "README.md",
    PUBLISHED / "README.md",
    ROOT / "docs" / "choose.md",
    EXAMPLES / "README.md",
    ROOT / "docs" / "compiled.md",
    ROOT / "docs" / "stiff.md",
)
BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)

BLOCKS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "losses": ("", losses_block),  # of all results
    "memory": ("memory_vs_steps", memory_block),
    "memory-short": ("memory_vs_steps", memory_short),
    "speed": ("speed", speed_block),
    "speed-short": ("speed", speed_short),
    "speed-small": ("speed", small_block),
    "gradients": ("gradients", gradients_block),
    "gradient-costs": ("gradients", gradient_costs),
    "methods": ("methods", methods_block),
    "grids": ("methods", grids_block),
    "compiled": ("compiled", compiled_block),
    "compiled-short": ("compiled", compiled_short),
    "compiled-sentence": ("compiled", compiled_sentence),
    "endurance": ("endurance", endurance_block),
    "stiff": ("stiff", stiff_block),
    "peers": ("peers", peers_block),
    "examples": ("examples", examples_block),
    "kernels": ("kernels", kernels_block),
    "solve": ("solve", solve_block),
    "device-loop": ("device_loop", device_loop_block),
    "gpu": ("gpu", gpu_block),
}


def block(name: str, folder: Path) -> str:
    """The text of a block: the results of each device that has them, one after another."""
    if name not in BLOCKS:
        raise SystemExit(f"There is no block `bench:{name}`; there are {', '.join(sorted(BLOCKS))}.")
    stem, render = BLOCKS[name]
    results = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{stem}*.json"))]
    return "\n\n".join(filter(None, map(render, results))) or "Not measured yet."


def filled(page: str, folder: Path) -> str:
    """The page with all its blocks filled."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{block(found['name'], folder)}\n\n{found[3]}", page)


def outdated(folder: Path = PUBLISHED) -> list[Path]:
    """The pages that do not show what that folder's JSON says."""
    return [path for path in PAGES if filled(path.read_text(), folder) != path.read_text()]


def write_pages(folder: Path = PUBLISHED) -> list[Path]:
    """Fills the blocks of the pages from that folder's JSON; returns the pages that changed."""
    changed = outdated(folder)
    for path in changed:
        path.write_text(filled(path.read_text(), folder))
    return changed
