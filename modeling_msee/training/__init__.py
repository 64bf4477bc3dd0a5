"""What trains the model: recipe, samples, optimisation, trainer."""
