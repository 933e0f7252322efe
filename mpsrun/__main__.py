"""`python -m mpsrun`: the command line, and the processes that the launcher starts."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]  # -m put the working directory there, where the user's files could hide our imports

from mpsrun.cli import main, main_of_child

if __name__ == "__main__":
    sys.exit(main_of_child(sys.argv[1:]) if len(sys.argv) > 1 else main())
