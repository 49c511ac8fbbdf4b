"""The methods as tables of coefficients, and the code that takes one step of each."""
