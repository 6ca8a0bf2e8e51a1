"""Choose a scheme for each layer: measure losses and sensitivities, and solve an integer program within a budget."""
