"""The first import of the package: without torch there is a sentence that says what to install."""

try:
    import torch as torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise  # torch is there, and something that it needs is not
    raise ModuleNotFoundError(
        "node_cuda needs PyTorch 2.6 or newer, and this Python has none. Type `pip install torch`, or see "
        "https://pytorch.org/get-started/locally for a build with your version of CUDA.",
        name="torch",
    ) from None
