"""Time and memory of cutting a 63 M subnet out of a BERT-base-size supernet, in memory and from disk to disk.

    python benchmarks/extract.py

The first part prints the median, fastest and slowest time of several extractions in memory, after one that is not
timed. The second part prints the peak resident memory of three fresh processes: one imports the package only, one runs
`extract_from_folder`, and one loads the supernet, extracts in memory and saves. The weights are random, because neither
time nor memory depends on them.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from supershaper_hf import SearchSpace, SuperShaperConfig, SuperShaperForMaskedLM


CHILD = {
    "import only": "import supershaper_hf; supershaper_hf.extract_from_folder",
    "from disk to disk": """
from supershaper_hf import extract_from_folder
extract_from_folder(source, shape, target)
""",
    "load, extract, save": """
from supershaper_hf import SuperShaperForMaskedLM
SuperShaperForMaskedLM.from_pretrained(source).extract_subnet(shape).save_pretrained(target)
""",
}


# The high-water mark of this process alone (Linux); ru_maxrss would include the parent's memory at the fork.
REPORT = """
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(line.split()[1])
"""


def peak_megabytes(code: str, source: Path, shape: list[int], target: Path) -> tuple[float, float]:
    """Run `code` in a fresh process; return its peak resident memory in MB (10^6 bytes) and its seconds."""
    prelude = f"source, shape, target = {str(source)!r}, {shape}, {str(target)!r}\n"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", prelude + code + REPORT], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) * 1024 / 1e6, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="Number of extractions in memory that are timed.")
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    supernet = SuperShaperForMaskedLM(SuperShaperConfig(vocab_size=28996))
    space = SearchSpace.from_config(supernet.config)
    shape = space.named_shape("supershaper", max_parameters=63_000_000)
    size = space.num_parameters(shape) * 4 / 1e6
    print(f"supernet {supernet.num_parameters():,} parameters, shape {shape}")
    print(f"subnet {space.num_parameters(shape):,} parameters, {size:.0f} MB; {torch.get_num_threads()} threads\n")

    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        supernet.extract_subnet(shape)
        seconds.append(time.perf_counter() - start)
    seconds = seconds[1:]
    median, low, high = statistics.median(seconds), min(seconds), max(seconds)
    print(f"extract_subnet: median {median:.2f} s, {low:.2f} to {high:.2f} s of {repeats} (target: under 1.5 s)\n")

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "supernet"
        supernet.save_pretrained(source)
        del supernet
        for number, (name, code) in enumerate(CHILD.items()):
            peak, elapsed = peak_megabytes(code, source, shape, Path(folder) / f"subnet{number}")
            print(f"{name:20s} peak {peak:5.0f} MB = subnet + {peak - size:4.0f} MB, {elapsed:.1f} s")
    print("target: from disk to disk below subnet + 600 MB")


if __name__ == "__main__":
    main()
