"""Writing with memory: who decides when a memory is invoked, and the loop that splices it in."""
