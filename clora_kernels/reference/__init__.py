"""What each operation computes, in plain PyTorch: the equations, their gradients, and sample inputs."""
