"""`python -m keepsight.cli`, which launchers such as `accelerate launch -m` need."""

from keepsight.cli import main

main()
