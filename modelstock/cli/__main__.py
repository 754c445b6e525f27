"""`python -m modelstock.cli`."""

from modelstock.cli import main

if __name__ == "__main__":
    main()
