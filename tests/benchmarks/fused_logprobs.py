"""Memory and time of `fused_logprobs` beside a whole log-softmax, forward + backward, run in turns on the CPU.
Both return log-probs and entropy.

    python tests/benchmarks/fused_logprobs.py [tokens] [vocabulary] [hidden]

Memory is the process's peak beyond the inputs and their gradients (Linux). Defaults: 4,096 x 32,000 x 1,024, fp32.
"""

import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 3


def memory(field: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def measure(version: str, N: int, V: int, H: int) -> tuple[float, float]:
    """Seconds, and MB beyond inputs and gradients."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from train_dvpo import fused_logprobs

    torch.manual_seed(0)
    hidden = torch.randn(N, H, requires_grad=True)
    weight = (torch.randn(V, H) / H**0.5).requires_grad_()
    labels, upstream = torch.randint(V, (N,)), torch.randn(N)

    def naive(hidden, weight, labels):
        log_softmax = torch.log_softmax(hidden @ weight.T, -1)
        with torch.no_grad():
            entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        return log_softmax.gather(1, labels[:, None])[:, 0], entropy

    function = {"fused": fused_logprobs, "naive": naive}[version]
    measured = []
    for _ in range(2):  # memory is the first run's, for later ones find some of it kept; time is the second's
        hidden.grad = weight.grad = None
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before, start = memory("VmRSS"), time.perf_counter()
        logprobs, _ = function(hidden, weight, labels)
        (logprobs * upstream).sum().backward()
        gradients = (hidden.numel() + weight.numel()) * 4 / 2**20
        measured.append((time.perf_counter() - start, memory("VmHWM") - before - gradients))
    return measured[1][0], measured[0][1]


def main() -> None:
    if sys.argv[1:2] in (["fused"], ["naive"]):
        print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
        return
    sizes = sys.argv[1:] or ["4096", "32000", "1024"]
    results = {"fused": [], "naive": []}
    for _ in range(ROUNDS):
        for version, rows in results.items():
            command = [sys.executable, __file__, version, *sizes]
            rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    for version, rows in results.items():
        seconds, megabytes = (statistics.median(column) for column in zip(*rows))
        print(f"{version}: {seconds:.2f} s, {megabytes:.0f} MB beyond inputs and gradients")
    for i, name in enumerate(("time", "memory")):
        ratios = sorted(fused[i] / naive[i] for fused, naive in zip(results["fused"], results["naive"]))
        print(f"fused / naive, {name}: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
