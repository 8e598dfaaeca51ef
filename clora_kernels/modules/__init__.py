"""Drop-in ``nn.Module``s: they own parameters and call the function of the same name."""
