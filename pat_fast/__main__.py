"""``python -m pat_fast`` is ``pat-fast``."""

from pat_fast.cli import main

if __name__ == "__main__":
    main()
