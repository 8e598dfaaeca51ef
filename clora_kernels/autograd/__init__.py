"""The public functions and their ``torch.autograd.Function``: validate, save, call, return. No arithmetic."""
