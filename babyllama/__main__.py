"""`python -m babyllama` is the same program as `babyllama`."""

from babyllama.cli import main

main()
