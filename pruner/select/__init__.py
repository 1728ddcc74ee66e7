"""Strategies: each gives the order in which a model's sublayers would go."""
