"""`keepsight demo`: a VLM loses its image, gets it back, and the memory is put to the test."""
