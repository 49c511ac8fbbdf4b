"""The parts of the benchmarks: a folder for each program beside this one, and common/ for what they share."""
