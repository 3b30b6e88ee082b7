"""`python -m chexlib`: the command line of `chexlib/app/cli.py`."""

from runpy import run_module

if __name__ == "__main__":
    run_module("chexlib.app.cli", run_name="__main__", alter_sys=True)
