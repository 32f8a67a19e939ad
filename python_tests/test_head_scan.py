"""The Hopper LM head's kernel without a GPU: head_scan.cu as it is and CUTLASS's mainloop and
pipelines, over emulated mbarriers, TMA, wgmma and clusters (emulator/cutlass.h).

Its results are to be the bytes of emulator/head_scan.cpp, which stands in for it in the tests of
the operators, in any order of its warps and of what is under way: a seed draws one.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import emulation
import pytest
from emulation import BUILD, ROOT

pytestmark = pytest.mark.timeout(900)  # CUTLASS is compiled twice, perhaps beside other work

SCHEDULES = {"cooperative": "pingpong=0", "pingpong": "pingpong=1"}
CASES = [
    # One tile in one block of the cluster, the other has no rows; fewer steps than stages.
    "capacity=128 vocab=256 width=64",
    "capacity=1 vocab=1 width=8 store=1",
    # Nothing to do for anyone, and for all but one row.
    "capacity=500 vocab=300 width=128 rows=0 stored=0 store=1",
    "capacity=500 vocab=300 width=320 rows=1 stored=0 store=1",
    # Several tiles; more units than clusters, and fewer.
    "capacity=300 vocab=2600 width=72 rows=290 stored=140 store=1 clusters=2",
    "capacity=300 vocab=2600 width=72",
    "capacity=260 vocab=511 width=256 bias=1 clusters=9",
    # Strides, a tile of one column, all that a logit can be made of.
    "capacity=700 vocab=1000 width=200 rows=600 stored=300 store=1 clusters=2 bias=1"
    " hidden_stride=208 weight_stride=256",
    "capacity=260 vocab=1025 width=640 rows=257 stored=1 store=1 clusters=3 temperature=1",
    "capacity=260 vocab=577 width=264 rows=257 stored=200 store=1 clusters=3 bias=1 temperature=1",
    # So many row blocks that they are walked in two groups; many steps.
    "capacity=4400 vocab=1100 width=8 clusters=3",
    "capacity=256 vocab=3000 width=1000 store=1",
]


@pytest.fixture(scope="module")
def head_scan() -> Path:
    if not shutil.which("nvcc", path=emulation.PATH) and not os.environ.get("CI"):
        pytest.skip("nvcc not found: head_scan.cu needs CUDA's headers")
    emulation.build("bupo_head_scan")
    return BUILD / "bupo_head_scan"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_same_bytes_in_any_order(head_scan: Path, schedule: str, case: str) -> None:
    done = subprocess.run(
        [head_scan, SCHEDULES[schedule], *case.split(), "seed=0", "seeds=12"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "refused",
    ["hidden_stride=76", "weight_stride=76", "width=4"],  # not multiples of 16 bytes
)
def test_what_tma_cannot_read_is_refused(head_scan: Path, refused: str) -> None:
    """By an assertion of CUTLASS here; in a release build the launch returns an error."""
    done = subprocess.run(
        [head_scan, *f"capacity=20 vocab=20 width=72 {refused}".split()],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "gmem_prob_stride" in done.stderr, done.stderr


KERNEL = "csrc/cuda/sm90/head_scan.cu"
MAINLOOP = "cutlass/gemm/collective/sm90_mma_tma_gmma_ss_warpspecialized.hpp"
STUCK = "no thread can go on"
# A statement to leave out, which one of its kind, and a pattern of what is said then.
PLANTED = {
    "loader_stays": (KERNEL, "state.advance(steps);", 1, "more arrivals at an mbarrier"),
    "reader_stays": (KERNEL, "state.advance(S::kPingpong", 1, f"{STUCK}|wgmma may still read"),
    "no_bytes": (KERNEL, "pipeline_params.transaction_bytes = ", 1, "TMA still loads"),
    "no_load_tail": (KERNEL, "mainloop.load_tail(", 1, "reaches a block that has left"),
    "no_mma_tail": (KERNEL, "mainloop.mma_tail(", 1, STUCK),
    "no_cluster_wait": (KERNEL, "cluster_wait();", 1, "no mbarrier of block"),
    "no_registers": (KERNEL, "cutlass::arch::warpgroup_reg_dealloc<", 1, "for registers"),
    "early_release": (MAINLOOP, "warpgroup_wait<K_PIPE_MMAS>();", 1, "wgmma may still read"),
    "early_read": (MAINLOOP, "pipeline.consumer_wait(smem_pipe_read, ", 3, "TMA still loads"),
    "early_load": (MAINLOOP, "pipeline.producer_acquire(", 1, "another one is under way"),
    "no_commit": (MAINLOOP, "warpgroup_commit_batch();", 1, "wgmma may still read"),
    "no_fence": (MAINLOOP, "warpgroup_arrive();", 3, "wgmma without wgmma.fence"),
    "no_store_wait": (KERNEL, "finish();", 1, "stmatrix where TMA still reads"),
    "no_store_fence": (KERNEL, "tma_store_fence();", 1, "written without a fence"),
    "no_store_sync": (KERNEL, "__syncwarp();", 2, "written without a fence"),
    "no_store_commit": (KERNEL, "tma_store_arrive();", 1, "without having committed"),
    "no_last_wait": (KERNEL, "store.finish();", 1, "leaves before TMA has read"),
}


# Of the ping-pong schedule alone.
PINGPONG = {
    "second_reads_first": (KERNEL, "state.advance(steps);", 2, STUCK),
    "no_turn_taken": (KERNEL, "turns.wait();", 1, "TMA still loads"),
    "no_turn_given": (KERNEL, "turns.arrive();", 1, STUCK),
}


def plant(text: str, name: str, begins: str, which: int) -> str:
    """The statement is left out when the program runs with BUPO_PLANTED=name."""
    first = -1
    for _ in range(which):
        first = text.index(begins, first + 1)
    last = text.index(";", first) + 1
    condition = f'std::getenv("BUPO_PLANTED") != std::string("{name}")'
    return f"{text[:first]}if ({condition}) {{ {text[first:last]} }}{text[last:]}"


@pytest.fixture(scope="module")
def with_errors(head_scan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same program with all of PLANTED; compiled as the other was."""
    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    commands = json.loads((BUILD / "compile_commands.json").read_text())
    (command,) = [x["command"].split() for x in commands if "hopper_head_scan" in x["file"]]
    (cutlass,) = [Path(x) for x in command if (Path(x) / MAINLOOP).exists()]
    for file, source in (KERNEL, ROOT), (MAINLOOP, cutlass):
        text = (source / file).read_text()
        for name, (planted_in, begins, which, _) in (PLANTED | PINGPONG).items():
            if planted_in == file:
                text = plant(text, name, begins, which)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    first = [f"-I{folder / 'csrc'}", f"-I{folder}"]
    planted = folder / "planted.o"
    command = [command[0], *first, *command[1 : command.index("-o")], "-O1", "-o", str(planted)]
    source = ROOT / "python_tests/emulator/hopper_head_scan.cpp"
    subprocess.run([*command, "-c", source], check=True)
    (cases,) = (BUILD / "python_tests").rglob("head_scan_cases.cpp.o")
    subprocess.run([command[0], planted, cases, "-o", folder / "program"], check=True)
    return folder / "program"


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        *((schedule, name) for schedule in SCHEDULES for name in PLANTED),
        *(("pingpong", name) for name in PINGPONG),
    ],
)
def test_planted_errors_are_seen(with_errors: Path, schedule: str, name: str) -> None:
    """Tests that cannot fail would be worth nothing."""
    said = ""
    for case in CASES[4], CASES[8]:
        done = subprocess.run(
            [with_errors, SCHEDULES[schedule], *case.split(), "seed=0", "seeds=12"],
            capture_output=True,
            text=True,
            env=os.environ | {"BUPO_PLANTED": name},
        )
        said += done.stdout
    assert re.search((PLANTED | PINGPONG)[name][3], said), said
