"""The former name of tests/programs/hostile_files.py: `python -m tests.hostile_files` goes on working."""

from tests.programs.hostile_files import main

if __name__ == "__main__":
    main()
