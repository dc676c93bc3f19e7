"""A run: the plan judged case by case, the power of its data, the search for more, and the result."""
