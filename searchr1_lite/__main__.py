"""`python -m searchr1_lite` is `searchr1`; `accelerate launch -m searchr1_lite train ...` needs it."""

from searchr1_lite.cli import main

if __name__ == "__main__":
    main()
