"""The compiled module `node_cuda._C`: code that builds it, and code that finds and loads it."""
