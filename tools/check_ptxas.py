"""nvcc, but spilled registers and serialised wgmma are errors: check_ptxas.py NVCC ARGUMENT...

CMake puts this in front of nvcc in BUPO_CUDA=CHECK, which passes -Xptxas=-v. Both faults cost a
kernel a multiple of its time and no test on a machine without a GPU would notice them.
"""

import re
import subprocess
import sys
from pathlib import Path

FUNCTION = re.compile(r"Function properties for '?([\w$.]+)")
ARCHITECTURE = re.compile(r"Compiling entry function '.*' for '(\w+)'")
SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
SERIALISED = re.compile(r"C75\d\d|Potential Performance Loss")


def faults(log: str) -> list[str]:
    """The reasons, one a line, not to accept the code that ptxas reported on in `log`."""
    found, architecture, function = [], "?", "?"
    for line in log.splitlines():
        if match := ARCHITECTURE.search(line):
            architecture = match[1]
        if match := FUNCTION.search(line):
            function = match[1]
        spill = SPILL.search(line)
        if spill and spill.groups() != ("0", "0"):
            found.append(f"{function} ({architecture}): {line.strip()}")
        if SERIALISED.search(line):  # names the function itself
            found.append(line)
    return found


def main() -> int:
    nvcc = subprocess.run(sys.argv[1:], stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    sources = [argument for argument in sys.argv if argument.endswith(".cu")]
    if nvcc.returncode or not sources:
        print(nvcc.stdout, end="")
        return nvcc.returncode
    for line in nvcc.stdout.splitlines():
        if "warning" in line or "error" in line:
            print(line)
    name = Path(sources[-1]).name
    if found := faults(nvcc.stdout):
        print(f"{name}: ptxas reports slow code", *found, sep="\n  ")
        Path(sys.argv[sys.argv.index("-o") + 1]).unlink(missing_ok=True)
        return 1
    kernels = set(re.findall(r"Compiling entry function '(\S+)'", nvcc.stdout))
    registers = max(map(int, re.findall(r"Used (\d+) registers", nvcc.stdout)), default=0)
    print(f"{name}: {len(kernels)} kernels, up to {registers} registers, no spills")
    return 0


if __name__ == "__main__":
    sys.exit(main())
