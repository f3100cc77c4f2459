"""The network: shape, forward pass, initialisation, parameter roles, cost in closed form, Hugging Face folders."""
