"""The cells of BENCHMARKS.md's tables."""

import datetime
import os
import statistics
import subprocess


def cell(values, digits=0):
    """The median, and the range of all."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratio(ours, theirs):
    """The ratio of the medians, and the range of the pairs' ratios."""
    pairs = [a / b for a, b in zip(ours, theirs)]
    medians = statistics.median(ours) / statistics.median(theirs)
    return f"{medians:.2f} ({min(pairs):.2f} to {max(pairs):.2f})"


def provenance():
    """Date, commit, hardware."""
    names = (line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    return [datetime.date.today().isoformat(), commit, f"{next(names, 'unknown CPU')}, {os.cpu_count()} cores"]


def show(header, *rows):
    print("\n" + table(header, *rows))


def table(header, *rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
