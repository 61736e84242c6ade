"""``python -m dpkit``."""
from dpkit.cli import main

main()
