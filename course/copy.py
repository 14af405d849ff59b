"""The copy of this repository that students get: python -m course.copy FOLDER

All files that git tracks, but those that give an assignment away: the reference solutions, the
wrong answers, the lecturer's page, the answers to the museum, and the museum's routers that are
an assignment's solution with one bug. --museum keeps these routers, for the week of the museum.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from config import UserError, argument, flag
from course.contain import ROOT
from engine.cli import parse, user_errors

WITHHELD = ("course/answers.md", "course/tests/solutions/", "course/tests/wrong_answers/",
            "course/tests/mutants.py", "course/tests/test_museum.py")  # fmt: skip
OF_ASSIGNMENTS = tuple(f"course/museum/{name}.py" for name in (
    "noisy", "even", "switch", "capacity", "balanced", "tracked", "expert_choice", "loss_free",
    "loss_free_ema", "counted"))  # fmt: skip


@dataclass(frozen=True)
class CopyConfig:
    """Make the students' copy."""

    folder: str = argument("FOLDER to make; it must be empty, if it exists")
    museum: bool = flag(False, "with all museum pieces, also those near to an assignment")


def files(museum: bool) -> list[str]:
    """The paths of the students' files, relative to the repository. Raises UserError."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        listed = subprocess.run(git, capture_output=True, check=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{ROOT}: git cannot list its files, which a clone has") from error
    withheld = WITHHELD + (() if museum else OF_ASSIGNMENTS)
    return [f for f in listed if (ROOT / f).is_file() and not f.startswith(withheld)]


@user_errors
def main(argv: list[str] | None = None) -> None:
    flags = parse(CopyConfig, argv, "course.copy")
    folder = Path(flags.folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: must be an empty folder, or one that does not exist")
    copied = files(flags.museum)
    for name in copied:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    print(f"{folder}: {len(copied)} files")


if __name__ == "__main__":
    main()
