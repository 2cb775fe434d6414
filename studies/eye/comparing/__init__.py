"""Methods on the frozen eye, compared: how they are trained, whether a memory is read, whether the language stays."""
