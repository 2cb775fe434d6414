"""One training run: its settings, what it trains, its output folder and its checks."""
