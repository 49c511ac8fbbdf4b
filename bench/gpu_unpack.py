"""Unpacks the gpu.json of bench/gpu.sh: writes the JSON of the benchmarks, and gpu-STAGE.json for each stage.

python bench/gpu_unpack.py --publish FOLDER...      # writes into bench/results/ and fills the tables of the pages
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from parts import program


def unpack(found: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the files, over those of an earlier run, and returns their paths."""
    files = {Path(name).name: result for name, result in found["results"].items()}
    head = {key: found[key] for key in ("device", "machine")}
    for stage in dict.fromkeys(line["stage"] for line in found["lines"]):
        lines = [line for line in found["lines"] if line["stage"] == stage]
        files[f"gpu-{stage}.json"] = {"benchmark": f"gpu-{stage}", **head, "lines": lines}
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in files.items():
        (folder / name).write_text(json.dumps(result, indent=1) + "\n")
    return [folder / name for name in files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    program.add_out(parser)
    arguments = parser.parse_args()
    paths: list[Path] = []
    for folder in arguments.folders:
        if not (folder / "gpu.json").is_file():
            raise SystemExit(f"There is no gpu.json in {folder}: bench/gpu.sh --out {folder} writes it.")
        paths += unpack(json.loads((folder / "gpu.json").read_text()), arguments.out)
    print(program.written("\n".join(map(str, paths)), arguments.out))


if __name__ == "__main__":
    main()
