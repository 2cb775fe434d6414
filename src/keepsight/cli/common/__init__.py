"""What the commands share: how they speak, how they load a model, options made of settings, progress."""
