"""`python -m inbatch`, and so `torchrun -m inbatch`: the command line."""

from inbatch.apps.cli import main

if __name__ == "__main__":
    main()
