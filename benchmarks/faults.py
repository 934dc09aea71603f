"""What faults do to a training run: a small real run is killed, starved and damaged, and then started again.

    python benchmarks/faults.py                     # 10 kills on one and on two processes: about 10 minutes on 2 cores
    python benchmarks/faults.py --kills 3 --seed 1

The run trains a tiny model on the bundled text, with dropout, dropped layers, evaluations, and a checkpoint after every
step. A kill is SIGKILL to all processes at once. Its moment is drawn uniformly from the time that the undisturbed run
takes from its first record to its end, so some kills fall into the writing of a file. After each fault the same command
is started again, and the final weights are compared bit for bit with those of the undisturbed run. The row with a full
tmpfs needs root.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from supershaper_hf import SuperShaperConfig, SuperShaperForMaskedLM
from supershaper_hf.data.batches import MicroBatches, fixed_masks
from supershaper_hf.data.documents import load_text, split_text
from supershaper_hf.data.sequences import tokenize, train_tokenizer
from supershaper_hf.report.tables import markdown_table
from supershaper_hf.training import loop, preparing
from supershaper_hf.training.arguments import SuperPretrainingArguments
from supershaper_hf.training.checkpoints import list_checkpoints
from supershaper_hf.training.loop import super_pretrain
from supershaper_hf.training.sandwich import sandwich_step


TEXT = Path(__file__).parent.parent / "examples" / "data" / "presidential_addresses.txt"
STEPS, SAVE_STEPS, FAULT_STEP, LENGTH = 24, 1, 10, 64


def train(folder: Path, fault: str) -> None:
    """Train to the end. The fault happens when the step of number `FAULT_STEP`, counted from 0, begins."""
    signal.alarm(300)
    sources = folder.parent / "sources"
    tokenizer = AutoTokenizer.from_pretrained(sources)
    if "stream" in folder.name:
        text, evaluation = load_text(sources / "parts", streaming=True), []
        preparing.MicroBatches = lambda *args, **options: MicroBatches(*args, documents_per_chunk=16, **options)
    else:
        documents, held_out = split_text(load_text(sources / "parts"), 0.02, seed=0)
        text = tokenize(documents, tokenizer, LENGTH)
        evaluation = fixed_masks(tokenize(held_out, tokenizer, LENGTH), tokenizer, 16)[:2]
    torch.manual_seed(0)
    config = SuperShaperConfig(
        vocab_size=len(tokenizer), hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192,
        max_position_embeddings=LENGTH, width_choices=[24, 48, 96],
    )  # fmt: skip
    args = SuperPretrainingArguments(
        max_steps=STEPS, per_device_train_batch_size=8, learning_rate=1e-3, max_length=LENGTH, drop_rate=0.2,
        output_dir=str(folder), logging_steps=1, eval_steps=8, save_steps=SAVE_STEPS,
    )  # fmt: skip
    loop.sandwich_step = disturbed_step(fault, sources / "parts")
    super_pretrain(SuperShaperForMaskedLM(config), tokenizer, text, args, eval_batches=evaluation)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def disturbed_step(fault: str, parts: Path) -> Callable:
    calls = []

    def step(accelerator, model, *args):
        calls.append(1)
        strike = len(calls) == FAULT_STEP + 1
        if strike and fault == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        if strike and fault == "remove":
            (parts / "9.txt").rename(parts.parent / "9.txt")
        if strike and fault == "die" and accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        losses = sandwich_step(accelerator, model, *args)
        if strike and fault == "nan":
            next(iter(model.parameters())).grad.fill_(float("nan"))
        return losses

    return step


def start(folder: Path, processes: int, fault: str = "") -> subprocess.Popen:
    command = [sys.executable]
    if processes > 1:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    command += [__file__, "--train", str(folder), "--fault", fault]
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent / "cache")}
    errors = (folder.parent / "errors.txt").open("w")
    return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=errors)


def began(run: subprocess.Popen, folder: Path) -> float:
    """Wait for the first record of the run; return the time."""
    while not (folder / "metrics.jsonl").exists() and run.poll() is None:
        time.sleep(0.01)
    return time.monotonic()


def finish(folder: Path, processes: int, fault: str = "") -> str:
    """Run to the end; return the error that it ended with, or an empty text."""
    run = start(folder, processes, fault)
    begin = began(run, folder)
    if run.wait(timeout=400) == 0:
        return ""
    errors = (folder.parent / "errors.txt").read_text().splitlines()
    message = next((line for line in reversed(errors) if "Error: " in line and "ChildFailedError" not in line), "")
    return f"exit {run.returncode} after {time.monotonic() - begin:.0f} s. {shorten(message, folder)}"


def shorten(message: str, folder: Path) -> str:
    text = message.replace(f"{folder.parent}/", "").replace("[rank0]: ", "").replace("|", "/")
    return text if len(text) < 260 else f"{text[:200]} ... {text[-55:]}"


def kill(folder: Path, processes: int, moment: float) -> None:
    """Kill the launcher and all its processes at once, `moment` seconds after training has begun."""
    run = start(folder, processes)
    began(run, folder)
    time.sleep(moment)
    children = children_of(run)
    run.kill()
    for process in children:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    run.wait()


def children_of(run: subprocess.Popen) -> list[int]:
    file = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    return [int(process) for process in file.read_text().split()] if run.poll() is None else []


def kill_launcher(folder: Path) -> str:
    """Kill the launcher alone; return how long its two processes went on and what they left."""
    run = start(folder, 2)
    began(run, folder)
    children = children_of(run)
    run.kill()
    run.wait()
    begin = time.monotonic()
    while any(Path(f"/proc/{process}").exists() for process in children) and time.monotonic() < begin + 120:
        time.sleep(0.05)
    return f"both ended after {time.monotonic() - begin:.1f} s, {left_behind(folder)}"


def left_behind(folder: Path) -> str:
    step = next((int(checkpoint.name[-8:]) for checkpoint in list_checkpoints(folder)), 0)
    unfinished = [*folder.glob(".*.partial"), *folder.glob(".*.old")]
    return f"{'while writing, ' if unfinished else ''}after step {step}"


def equal(folder: Path, expected: Path) -> str:
    ours, theirs = (load_file(path / "last" / "model.safetensors") for path in (folder, expected))
    different = [name for name, tensor in theirs.items() if not torch.equal(tensor, ours[name])]
    return "yes" if not different else f"no: {len(different)} tensors differ"


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.unlink()
    if how != "missing":
        file.write_bytes(content if how == "flipped bit" else content[: len(content) // 2])


Row = tuple[str, int, str, str]  # fault, how many times, what happened, whether the run ended as the undisturbed one


def study(work: Path, kills: int, seed: int) -> Iterator[Row]:
    prepare(work / "sources")
    generator = random.Random(seed)
    for processes in (1, 2):
        yield killed(work, processes, kills, generator)
    yield from starved(work)
    yield from damaged(work)
    yield from disturbed_text(work)


def killed(work: Path, processes: int, kills: int, generator: random.Random) -> Row:
    """Kill the run at random moments. The undisturbed run stays in `whole-<processes>`."""
    whole = work / f"whole-{processes}"
    begin = began(run := start(whole, processes), whole)
    if run.wait() != 0:
        raise RuntimeError((work / "errors.txt").read_text())
    duration = time.monotonic() - begin
    struck, ends = Counter(), Counter()
    for _ in range(kills):
        folder = work / "killed"
        kill(folder, processes, generator.uniform(0, duration))
        struck["while a checkpoint was written" if "writing" in left_behind(folder) else "between two checkpoints"] += 1
        ends[finish(folder, processes) or equal(folder, whole)] += 1
        shutil.rmtree(folder)
    where, same = (", ".join(f"{n} {what}" for what, n in sorted(found.items())) for found in (struck, ends))
    return f"SIGKILL within {duration:.1f} s, {processes} process(es)", kills, where, same


def starved(work: Path) -> Iterator[Row]:
    """Take a process, the launcher, or the room on the disk away."""
    for fault, processes, name in (("die", 2, "One of two processes dies"), ("limit", 1, "Full disk (RLIMIT_FSIZE)")):
        folder = work / fault
        happened = finish(folder, processes, fault)
        yield name, 1, happened, finish(folder, processes) or equal(folder, work / f"whole-{processes}")
    happened = kill_launcher(folder := work / "orphaned")
    yield "Launcher killed alone", 1, happened, finish(folder, 2) or equal(folder, work / "whole-2")
    if os.geteuid() == 0:
        yield "Full disk (tmpfs), then made larger", 1, *full_tmpfs(work / "tmpfs", work / "whole-1")


def damaged(work: Path) -> Iterator[Row]:
    """Damage a file of the newest checkpoint, and the gradients of a step."""
    whole = work / "whole-1"
    for how in ("truncated", "flipped bit", "missing"):
        folder = shutil.copytree(whole, work / how.replace(" ", "-"))
        shutil.rmtree(folder / "last")
        damage(list_checkpoints(folder)[0] / "optimizer.safetensors", how)
        error = finish(folder, 1)
        warning = next(line for line in (work / "errors.txt").read_text().splitlines() if "is damaged" in line)
        yield f"File of a checkpoint: {how}", 1, shorten(warning, folder), error or equal(folder, whole)
    finish(folder := work / "nan", 1, "nan")
    skipped = json.loads((folder / "training_summary.json").read_text())["skipped_steps"]
    yield "NaN in the gradients of a step", 1, f"{skipped} step skipped, run finished", "no: one update less"


def disturbed_text(work: Path) -> Iterator[Row]:
    """Remove a text file while it is streamed."""
    finish(stream := work / "stream-whole", 1)
    folder = work / "stream-removed"
    happened = f"{finish(folder, 1, 'remove')} Stopped {left_behind(folder)}"
    (work / "sources" / "9.txt").rename(work / "sources" / "parts" / "9.txt")
    yield "Text file removed while streaming", 1, happened, finish(folder, 1) or equal(folder, stream)


def full_tmpfs(mount: Path, whole: Path) -> tuple[str, str]:
    """Train on a file system that has room for one checkpoint, but not for two, and again when it is larger."""
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", mount], check=False).returncode:
        return "not possible here", ""
    try:
        shutil.copytree(whole.parent / "sources", mount / "sources")
        happened = finish(mount / "run", 1)
        subprocess.run(["mount", "-o", "remount,size=200m", mount], check=True)
        return happened, finish(mount / "run", 1) or equal(mount / "run", whole)
    finally:
        subprocess.run(["umount", mount], check=True)


def prepare(sources: Path) -> None:
    """Train a tokenizer, and cut the text into ten files."""
    documents = TEXT.read_text().splitlines()
    train_tokenizer(documents[:200], vocab_size=1000, max_length=LENGTH).save_pretrained(sources)
    (sources / "parts").mkdir()
    for part in range(10):
        (sources / "parts" / f"{part}.txt").write_text("\n".join(documents[part * 8 : part * 8 + 8]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="Number of kills on one process, and again on two.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed of the moments of the kills.")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # the script starts itself with these two
    parser.add_argument("--fault", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train, options.fault)
        return
    rows, head = [], ("fault", "times", "what happened", "equal to undisturbed")
    with tempfile.TemporaryDirectory() as work:
        for fault in study(Path(work), options.kills, options.seed):
            print(*fault, sep=" | ", file=sys.stderr)
            rows.append(dict(zip(head, map(str, fault), strict=True)))
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
