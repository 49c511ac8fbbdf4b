"""The compiled module `node_cuda._C`: how it is built, and how it is found."""
