"""Train with known faults; otherwise as `python -m searchr1_lite.training`.

python -m searchr1_lite.lab --run-folder runs/wrong-sign group_size=5 defects='[kl_sign]'
"""

from searchr1_lite.lab.defects import train_broken
from searchr1_lite.lab.profile import load_broken
from searchr1_lite.training import __main__ as training


def main(arguments: list[str] | None = None) -> None:
    training.main(arguments, "lab", load_broken, train_broken)


if __name__ == "__main__":
    main()
