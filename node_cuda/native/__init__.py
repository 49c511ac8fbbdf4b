"""Compiled solves on the CPU: the loop over steps, with func inside, as native code made by PyTorch's compiler."""
