"""What compute-sanitizer and the profilers watch. `small` makes every call of smoke.py at ragged
shapes, cut into several chunks by a small workspace. `large` makes one call between
cudaProfilerStart and cudaProfilerStop, and `table` prints torch.profiler's table of its kernels."""

import argparse

import torch
from smoke import CALLS, backward, forward, inputs, policy_loss, results

import bupo.ops as ops

# N, D, V: rows, widths and vocabularies on both sides of the tiles of 128, 256 and 64.
SMALL = [(1, 8, 7), (7, 100, 1), (130, 64, 513), (257, 72, 1031), (129, 264, 4099)]
LARGE = (2048, 4096, 151936)


def small(device: str) -> None:
    for workspace, shapes in ((1 << 18, SMALL), (1 << 30, SMALL[3:4])):
        for shape in shapes:
            for name, call in CALLS.items():
                ops.set_workspace_bytes(workspace)
                outputs, gradients = results(call, ops, inputs(shape, device))
                finite = all(bool(x.isfinite().all()) for x in gradients.values())
                assert finite and not outputs.isnan().any(), (name, workspace, shape)
    if device == "cuda":  # a target out of range gives nan, and reads nothing that is not there
        given = inputs(SMALL[2], device)
        given["targets"][5], given["targets"][6] = 2**40, -7
        with torch.no_grad():
            (logprobs, _), _ = backward(ops, given)
        assert logprobs.isnan().nonzero().flatten().tolist() == [5, 6], logprobs
    print("exercise: every call gave numbers")


def large(device: str) -> None:
    """One policy_loss with its gradient and one forward, warmed up."""
    given = inputs(LARGE, device)
    with torch.no_grad():
        given["old_logprobs"] = backward(ops, given)[0][0]

    def once() -> None:
        results(lambda *x: policy_loss(*x, clip_low=1.0, clip_high=1e9), ops, given)
        given["hidden"].grad = given["weight"].grad = None
        forward(ops, given)

    once()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    once()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def table(device: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        large(device)
    rows = found.key_averages()
    print(rows.table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=100))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["small", "large", "table"])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="cpu: small only")
    args = parser.parse_args()
    {"small": small, "large": large, "table": table}[args.what](args.device)


if __name__ == "__main__":
    main()
