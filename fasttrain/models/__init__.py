"""Example models. Any `torch.nn.Module` trains; these are here to start from and to read."""
