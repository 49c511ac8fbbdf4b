"""The methods as data, and how one step of each is taken."""
