"""Scripts that measure, their results as JSON, and the tables made from them."""
