"""Does a VLM lose its image while it writes, and is its memory really used?"""
