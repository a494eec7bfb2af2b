"""Runs a program and measures it, stage by stage: wall time, CPU time, peak memory.

A stage ends with a line on the program's standard error, `LABEL SECONDS s`, as `sd-upscale -v` and the programs beside
this file write them. Seconds are the program's own; CPU time and memory are read from /proc, so on Linux alone.
"""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time

ENDED = re.compile(r"^(?:.*: )?(load|text|encode|base|denoise|unet|decode) ([0-9.]+) s$")
MEDIAN = re.compile(r"^(?:.*: )?step ([0-9.]+) s \(median of [0-9]+\)$")
FIRST = re.compile(r"^(?:.*: )?first step after ([0-9.]+) s$")

INTERVAL = 0.02  # seconds between two readings of a program's memory


def cpu_seconds(pid):
    """User and system time of all its threads so far, or None where there is no /proc."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid):
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return None


def peak_bytes(pid):
    """The highest resident memory of a process so far, as the kernel keeps it, or None where there is no /proc."""
    try:
        with open(f"/proc/{pid}/status") as file:
            line = next(line for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


class Memory(threading.Thread):
    """Follows a process's resident memory until `stop` is set."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.highest, self.peak, self.stop = pid, None, None, threading.Event()

    def run(self):
        while not self.stop.wait(INTERVAL):
            self.read()

    def read(self):
        now = resident_bytes(self.pid)
        if now is not None:
            self.highest = max(now, self.highest or 0)
        # It only grows; what the system counts for a child that is gone has the parent's before it became this program in it.
        self.peak = peak_bytes(self.pid) or self.peak

    def since_last(self):
        """Bytes at the highest since it was last asked, or None where there is no /proc."""
        self.read()
        highest, self.highest = self.highest, None
        return highest


def watch(command, environment):
    """What one run of `command` took:

    wall, cpu (seconds) and peak (bytes) of the whole process; stages: label -> list of {seconds, cpu, peak}; step:
    median seconds of a UNet call; first: seconds from the start of the process to the first UNet call; stdout: text; stderr: its
    lines.
    """
    stages, step, first, said, cpu_before = {}, None, None, [], 0.0
    with tempfile.TemporaryFile("w+") as out:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        memory = Memory(process.pid)
        memory.start()
        for line in process.stderr:
            now = time.perf_counter() - start
            line = line.rstrip()
            said.append(line)
            if found := ENDED.match(line):
                label, seconds = found[1], float(found[2])
                cpu = cpu_seconds(process.pid)
                spent = None if cpu is None else cpu - cpu_before
                cpu_before = cpu
                stages.setdefault(label, []).append({"seconds": seconds, "cpu": spent, "peak": memory.since_last()})
                if label == "unet" and first is None:
                    first = now - seconds
            elif found := MEDIAN.match(line):
                step = float(found[1])
            elif found := FIRST.match(line):
                first = float(found[1])
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        memory.stop.set()
        if process.returncode != 0:
            sys.exit("\n".join([f"{' '.join(map(str, command))}: exit status {process.returncode}", *said[-10:]]))
        out.seek(0)
        text = out.read()
    return {
        "wall": wall,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak": memory.peak or usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "stages": stages,
        "step": step,
        "first": first,
        "stdout": text,
        "stderr": said,
    }
