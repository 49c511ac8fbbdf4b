"""The layers of the package, and their picture in docs/architecture.md: `python tools/layers.py` draws it anew.

tests/project/test_architecture.py says that imports point down only, and that the pictures are up to date.
"""

from __future__ import annotations

import ast
import re
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "node_cuda"
PAGES = ("docs/architecture.md",)

# From the bottom up; within a layer a module may import those to its left. "" is node_cuda itself.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "_needs_torch",
        "_version",
        "_typing",
        "_extras",
        "status",
        "_plots",
        "_torch_modes",
        "_eager",
        "_user_code",
    ),
    ("extension.build", "extension.loading", "extension"),
    (
        "kernels.norms",
        "kernels.reference",
        "kernels.stage_times",
        "kernels.step_control",
        "kernels.sums",
        "kernels.arithmetic",
        "kernels.step_log",
        "kernels.control",
        "kernels.memory",
        "kernels.fused_sums",
        "kernels.fused",
        "kernels.check_record",
        "kernels.check_rows",
        "kernels.self_check",
        "kernels.backend",
        "kernels",
    ),
    ("options", "_parse_options", "solution", "problem.field", "problem.problem", "problem"),
    (
        "methods.tableau",
        "methods.tableaus",
        "methods.step",
        "methods.evaluations",
        "methods.implicit.tableau",
        "methods.implicit.tableaus",
        "methods.implicit.blocks",
        "methods.implicit.jacobian",
        "methods.implicit.linear",
        "methods.implicit.inside",
        "methods.implicit.rosenbrock",
        "methods.implicit.newton",
        "methods.implicit.equations",
        "methods.implicit.dirk",
        "methods.implicit.coupled",
        "methods.implicit.steps",
        "methods.implicit",
        "methods.explicit_rk",
        "methods.adams",
        "methods.interpolation",
        "methods.registry",
        "methods.order_conditions",
        "methods.register",
        "methods",
    ),
    ("controllers",),
    (
        "loop.step_control",
        "loop.progress",
        "loop.host_loop",
        "loop.outputs",
        "loop.events",
        "loop.stiffness",
        "loop.grids",
        "loop.assemble",
        "loop.scipy_solver",
        "loop.request",
        "loop.dense",
        "loop.plain_grid",
        "loop",
    ),
    (
        "cuda_graphs.capture",
        "cuda_graphs.device_loop",
        "cuda_graphs.parts",
        "cuda_graphs.first_run_check",
        "cuda_graphs.fingerprint",
        "cuda_graphs.cache",
        "cuda_graphs.captured",
        "cuda_graphs.forward",
        "cuda_graphs",
    ),
    (
        "native.numbers",
        "native.step",
        "native.tracing",
        "native.allocation",
        "native.pairs",
        "native.complex_pairs",
        "native.build",
        "native.cache",
        "native.loop",
        "native.forward",
        "native.reverse",
        "native.adjoint",
        "native",
    ),
    (
        "gradients.parameters",
        "gradients.context",
        "gradients.members",
        "gradients.changed",
        "gradients.forward",
        "gradients.reached",
        "gradients.event_time",
        "gradients.inspection",
        "gradients.leaves",
        "gradients.autograd",
    ),
    (
        "gradients.adjoint.norm",
        "gradients.adjoint.field",
        "gradients.adjoint.autonomy",
        "gradients.adjoint.reconstruction",
        "gradients.adjoint.backward_solve",
        "gradients.adjoint.plain_grid",
        "gradients.adjoint.cuda_graph",
        "gradients.adjoint.native",
        "gradients.adjoint.many_outputs",
        "gradients.adjoint.mode",
        "gradients.adjoint",
    ),
    (
        "gradients.discrete.memory",
        "gradients.discrete.checkpoints",
        "gradients.discrete.trajectory",
        "gradients.discrete.step_adjoint",
        "gradients.discrete.whole_step",
        "gradients.discrete.implicit_step",
        "gradients.discrete.cuda_graph_forward",
        "gradients.discrete.cuda_graph_reverse",
        "gradients.discrete.native",
        "gradients.discrete.reverse_pass",
        "gradients.discrete.mode",
        "gradients.discrete",
    ),
    ("gradients.stored_adjoint", "gradients.by_adjoint"),
    ("gradients.auto", "gradients.registry", "gradients"),
    ("integrals.integral", "integrals.regularized", "integrals"),
    ("_arguments", "odeint", "event", "compiled", "diagnosis", "nn.neural_ode", "nn.residual", "nn.flow", "nn"),
    (
        "as_torchdiffeq.names",
        "as_torchdiffeq.install",
        "as_torchdiffeq.startup",
        "as_torchdiffeq.startup.sitecustomize",
        "as_torchdiffeq",
        "",
        "as_torchdiffeq.run",
        "__main__",
    ),
)


def first_sentence(name: str) -> str:
    """What a module or folder says of itself, on one line."""
    path = PACKAGE.joinpath(*name.split("."))
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    doc = ast.get_docstring(ast.parse(text)) or ""
    return re.split(r"(?<=\.)\s", " ".join(doc.split()), maxsplit=1)[0].rstrip(".")


def rows() -> list[tuple[str, str]]:
    """From the top down: a folder with its sentence, or the user's modules in one line."""
    found: list[tuple[str, str]] = []
    for layer in reversed(LAYERS):
        for folder, names in groupby(layer, key=lambda name: name.rpartition(".")[0] or name):
            inside = [name for name in names if name != folder]
            if folder and (inside or (PACKAGE / folder).is_dir()):
                found.append((folder.replace(".", "/") + "/", first_sentence(folder)))
            elif not folder.startswith("_") and folder:
                found.append((f"{folder}.py", first_sentence(folder)))
    return list(dict.fromkeys(found))


def picture() -> str:
    """The rows, as a block of code."""
    width = max(len(name) for name, _ in rows()) + 2
    return "\n".join(["```text", *(f"{name:{width}}{sentence}" for name, sentence in rows()), "```"])


def drawn(page: str) -> str:
    """The page with the picture between its two marks."""
    return re.sub(r"(<!-- layers -->\n).*?(\n<!-- /layers -->)", rf"\g<1>\n{picture()}\n\g<2>", page, flags=re.DOTALL)


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        path.write_text(drawn(path.read_text()))
