"""``nn.Module`` to Program, through one ``torch.export`` capture. See README.md beside this file."""
