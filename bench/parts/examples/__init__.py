"""How examples.py runs the examples, and the table that it makes."""
