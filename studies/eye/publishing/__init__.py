"""What others can take: the eye's file, a folder to publish, and the whole model as an ordinary checkpoint."""
