"""How one step is taken: explicit Runge-Kutta methods from a tableau, and the Adams methods."""
