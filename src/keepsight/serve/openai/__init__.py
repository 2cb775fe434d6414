"""OpenAI's chat completions over HTTP: requests checked, images taken in, answers put into words."""
