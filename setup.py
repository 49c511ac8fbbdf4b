"""Metadata is in pyproject.toml; here is the compiled module, in one of three settings: see extension/build.py."""

import importlib.util
import sys
from pathlib import Path

import setuptools
from setuptools import find_namespace_packages, find_packages, setup
from setuptools.command.build_py import build_py

if int(setuptools.__version__.split(".")[0]) < 77:  # such as that of a new environment of Python 3.10 or 3.11
    sys.exit(
        f"node_cuda needs setuptools 77 or newer to be installed, and this Python has {setuptools.__version__}. "
        "Type `pip install --upgrade setuptools`, and then the same command again."
    )

ROOT = Path(__file__).resolve().parent
# By its path: importing node_cuda imports torch, which an isolated build does not have.
spec = importlib.util.spec_from_file_location("node_cuda_build", ROOT / "node_cuda" / "extension" / "build.py")
build = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = build
spec.loader.exec_module(build)

KERNELS = "The kernels come with --no-build-isolation, a CUDA build of torch and nvcc, or on the first CUDA solve."


def package_folder(command):
    """Where a command leaves its results: the source tree of an editable install, else what becomes the wheel."""
    in_place = getattr(command, "editable_mode", False) or getattr(command, "inplace", False)
    return ROOT / "node_cuda" if in_place else Path(command.build_lib) / "node_cuda"


def only_python(command, why):
    """This build has no compiled module: say so, leave the note, and take away what an earlier build left in place."""
    build.say(f"installed as pure Python, without CUDA kernels: {why}. {KERNELS}")
    folder = package_folder(command)
    for old in folder.glob("_C.*.so"):
        old.unlink()
    build.write_note(folder, build.Note("python", why))


class PurePython(build_py):
    """Copies the package, and leaves the note."""

    def run(self):
        super().run()
        only_python(self, recipe.why)


def compiled(recipe):
    """The arguments of setup() that compile the module."""
    from torch.utils import cpp_extension

    class Compile(cpp_extension.BuildExtension):
        """torch's build, which leaves the note; where nobody asked for the kernels, it may fail."""

        def run(self):
            try:
                super().run()
            except Exception as error:
                if build.asked():
                    raise
                self.extensions = []
                only_python(self, f"{build.MODULE} did not compile ({type(error).__name__}: see the lines above)")
            else:
                if recipe.setting == "cpu":
                    build.say(f"installed with its C++ part, without CUDA kernels: {recipe.why}. {KERNELS}")
                build.write_note(
                    package_folder(self), build.Note(recipe.setting, recipe.why, build.digest(ROOT / "csrc"))
                )

    if recipe.kernels:
        cpp_extension.CUDA_HOME = str(recipe.toolkit.home)  # torch looks for none where it is a CPU build
    extension = cpp_extension.CppExtension(
        build.MODULE,
        [str(Path(source).relative_to(ROOT)) for source in build.sources(ROOT / "csrc", recipe.kernels)],
        include_dirs=build.include_folders(recipe, ROOT / "csrc"),
        library_dirs=build.library_folders(recipe),
        libraries=build.libraries(recipe),
        define_macros=build.macros(recipe, ROOT / "csrc"),
        extra_compile_args={"cxx": list(build.CXX_FLAGS), "nvcc": build.nvcc_flags(recipe)},
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Compile}}


# Metadata and the source archive are made in runs of their own, which need no decision and no import of torch.
BUILDS = {"bdist", "bdist_wheel", "build", "build_ext", "build_py", "develop", "editable_wheel", "install"}
options = {}
if BUILDS & set(sys.argv):
    try:
        recipe = build.choose()
    except build.BuildError as error:
        raise SystemExit(f"\n*** node_cuda: {error}\n") from None
    else:
        options = {"cmdclass": {"build_py": PurePython}} if recipe.setting == "python" else compiled(recipe)

# csrc and its folders travel in the package: an install without the compiled module can compile it on first use.
csrc = [f"node_cuda.{name}" for name in find_namespace_packages(include=["csrc*"])]
setup(
    packages=[*find_packages(include=["node_cuda*"]), *csrc],
    package_dir={"node_cuda.csrc": "csrc"},
    package_data={"node_cuda": ["py.typed"], **{name: ["*"] for name in csrc}},
    **options,
)
