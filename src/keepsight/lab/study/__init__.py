"""The lab's machine: what a study is, running its cells in processes, keeping and judging what they found."""
