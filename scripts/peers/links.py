"""The rows of links.sh, from the folder in which it has left its results.

    python links.py FOLDER "LINK..." "BATCH..."
"""

import glob
import json
import sys

import rows

GBIT = {"1gbit": 1, "10gbit": 10}


def main():
    folder, links, batches = sys.argv[1], sys.argv[2].split(), sys.argv[3].split()
    header = ["date", "commit", "hardware", "link", "trainer, Gb/s", "of line rate", "Gloo, Gb/s", "ratio", "#wrong"]
    rows.show(header, *[row(folder, link) for link in links])
    alexnet(folder)
    header = ["date", "commit", "hardware", "samples a rank", "gradients, ms a step", "factors, ms a step", "ratio"]
    rows.show(header, *[exchange(folder, batch) for batch in batches])


def row(folder, link):
    results = [read(f"{folder}/{link}.{name}.jsonl") for name in ("trainer", "gloo")]
    ours, gloo = ([8 * result["busbw_gb_s"] for result in runs] for runs in results)
    share = rows.cell([100 * rate / GBIT[link] for rate in ours], 1) + " %" if link in GBIT else ""
    wrong = sum(result["wrong"] for runs in results for result in runs)
    return [*rows.provenance(), link, rows.cell(ours, 2), share, rows.cell(gloo, 2), rows.ratio(ours, gloo), str(wrong)]


def exchange(folder, batch):
    on, off = ([result["step_ms"] for result in read(f"{folder}/step.{batch}.{which}.jsonl")] for which in ("on", "off"))
    return [*rows.provenance(), batch, rows.cell(off), rows.cell(on), rows.ratio(off, on)]


def read(path):
    return [json.loads(line) for line in open(path)]


def alexnet(folder):
    runs = [json.load(open(path)) for path in sorted(glob.glob(f"{folder}/alexnet.*.json"))]
    percent = {key: rows.cell([100 * run[key] for run in runs], 1) for key in ("exposed_communication", "waiting")}
    images = rows.cell([run["samples_per_second"] for run in runs], 1)
    header = ["date", "commit", "hardware", "net", "link", "images/s", "exposed communication", "waiting"]
    net = "configs/alexnet.toml, bf16, batch 32 a rank, 2 ranks"
    shares = [f"{percent['exposed_communication']} %", f"{percent['waiting']} %"]
    rows.show(header, [*rows.provenance(), net, "10gbit", images, *shares])


if __name__ == "__main__":
    main()
