"""Run the command line as `python -m tadsr`."""

from tadsr.cli import main

if __name__ == "__main__":
    main()
