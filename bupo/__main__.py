"""The command `bupo NAME ...`, which is `python -m bupo.NAME ...`."""

import runpy
import sys

COMMANDS = {
    "run": "train a model",
    "evaluate": "Avg@n and Pass@K of a model",
    "analyze": "what each layer of a model predicts",
    "report": "the page of one run, or of several overlaid",
}


def main() -> int:
    """Runs the module that the first argument names; exit status 2 for an unknown one."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.path.insert(0, "")  # as with `python -m`, so that modules of the user are found
        del sys.argv[1]
        runpy.run_module(f"bupo.{name}", run_name="__main__", alter_sys=True)
        return 0
    lines = [f"  bupo {one:<9} {what}" for one, what in COMMANDS.items()]
    text = "\n".join([*lines, "bupo NAME --help lists the settings of each."])
    if name in ("-h", "--help"):
        print(text)
        return 0
    print(f"bupo: unknown command {name}; the commands are\n{text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
