"""Runs a script's stages in order, each once: what is done is remembered, so an interrupted run goes on where it was.

A stage is a few commands that run side by side. It counts as done when all of them ended well, and as long as its commands,
the recipes that they name, and those of the stages before it stay the same.
"""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from encoder.errors import DataError

POLL_SECONDS = 0.5


@dataclass
class Stage:
    """One step of a pipeline.

    name: short, unique, names the log files
    title: what a person reads while it runs
    commands: argument lists; they run at the same time and share the processor cores evenly
    """

    name: str
    title: str
    commands: list[list[str]]


def commit() -> str | None:
    """The commit of the tree these scripts run in, with a + where tracked files differ from it; None outside of git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _last_line(log: Path) -> str:
    """The newest line that a log shows a person; progress bars rewrite theirs with a carriage return."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _run(stage: Stage, logs: Path, number: str) -> float:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, cores // len(stage.commands))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    start, processes, paths = time.monotonic(), [], []
    failed = None
    interactive = sys.stderr.isatty()
    try:
        for i, command in enumerate(stage.commands):
            paths.append(logs / f"{stage.name}{'' if len(stage.commands) == 1 else f'_{i + 1}'}.log")
            with paths[-1].open("a") as log:
                log.write(f"$ {shlex.join(command)}\n")
                log.flush()
                # A session of its own: Ctrl-C reaches the command once, from here, with all that it started.
                processes.append(
                    subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
                )
        while any(process.poll() is None for process in processes):
            time.sleep(POLL_SECONDS)
            if interactive:
                text = " || ".join(_last_line(path)[:90] for path in paths)
                print(f"\r\033[K{number} {stage.title} {time.monotonic() - start:4.0f} s  {text}"[:230], end="", file=sys.stderr)
            failed = next((i for i, process in enumerate(processes) if process.poll() not in (None, 0)), None)
            if failed is not None:
                break
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
        if interactive:
            print("\r\033[K", end="", file=sys.stderr)
    # The one that failed of itself, not those that were stopped because of it.
    if failed is None:
        failed = next((i for i, process in enumerate(processes) if process.returncode), None)
    if failed is not None:
        tail = "\n".join(paths[failed].read_text(errors="replace").replace("\r", "\n").splitlines()[-8:])
        code = processes[failed].returncode
        raise DataError(f"stage '{stage.name}' failed with exit code {code}; its log {paths[failed]} ends:\n{tail}")
    return time.monotonic() - start


def run_stages(stages: list[Stage], folder: Path) -> None:
    """Runs what is not done yet; one line per stage. Logs are in folder/logs, the memory of what is done in folder/done."""
    logs, done = folder / "logs", folder / "done"
    logs.mkdir(parents=True, exist_ok=True)
    done.mkdir(exist_ok=True)
    key = hashlib.sha256()
    for i, stage in enumerate(stages, 1):
        commands = json.dumps(stage.commands)
        recipes = [Path(name) for name in re.findall(r"[\w./-]+\.yaml", commands)]
        key.update(commands.encode() + b"".join(recipe.read_bytes() for recipe in recipes if recipe.is_file()))
        marker, number = done / f"{stage.name}.json", f"[{i}/{len(stages)}]"
        if marker.is_file() and json.loads(marker.read_text())["key"] == key.hexdigest():
            print(f"{number} {stage.title}: done before", flush=True)
            continue
        if not sys.stderr.isatty():
            print(f"{number} {stage.title} ...", flush=True)
        started_from = commit()
        seconds = _run(stage, logs, number)
        done_now = {"key": key.hexdigest(), "seconds": round(seconds, 1), "commit": started_from, "commands": stage.commands}
        marker.write_text(json.dumps(done_now, indent=1))
        print(f"{number} {stage.title}: {seconds:.0f} s", flush=True)
