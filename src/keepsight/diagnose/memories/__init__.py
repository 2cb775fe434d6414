"""The one interface through which the diagnosis handles a memory, and the methods behind it."""
