"""``python -m pat_fast`` is ``pat-fast``."""

from .cli import main

if __name__ == "__main__":
    main()
