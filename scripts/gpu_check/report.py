"""What was found, as Markdown and as JSON."""

import datetime
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "peers"))
import rows  # noqa: E402


class Report:
    def __init__(self, out, rehearsal):
        self.out, self.rehearsal = Path(out), rehearsal
        self.outcomes, self.sections, self.figures, self.goals = [], {}, {}, {}

    def outcome(self, part, what, text, seconds=None):
        """How a part ended: passed, cut short, failed, skipped or not reached."""
        self.outcomes.append((part, what, text, seconds))

    def expect(self, goal, asked):
        """What this check should see."""
        self.goals[goal] = (asked, "", "not measured")

    def see(self, goal, seen, met):
        """What it has seen of it, and whether that is enough; None where something is still missing."""
        verdict = {True: "met", False: "missed", None: "met so far"}[met]
        self.goals[goal] = (self.goals[goal][0], seen, "rehearsed" if self.rehearsal else verdict)

    def has_failures(self):
        failed = any(what == "failed" for _, what, _, _ in self.outcomes)
        return failed or any(verdict == "missed" for _, _, verdict in self.goals.values())

    def table(self, title, header, *table_rows, note=""):
        """A section; one of the same title is replaced."""
        self.sections[title] = rows.table(header, *table_rows) + (f"\n\n{note}" if note else "")

    def text(self, title, text):
        """A section of lines as a program has printed them."""
        self.sections[title] = f"```\n{text.rstrip()}\n```"

    def keep(self, name, figures):
        """For the JSON."""
        self.figures[name] = figures

    def write(self):
        """Both files, with what there is by now; gives the Markdown."""
        outcomes = [
            [part, what, "" if seconds is None else f"{seconds:.0f}", text.replace("|", "/").replace("\n", " ")]
            for part, what, text, seconds in self.outcomes
        ]
        head = f"## GPU check, {datetime.date.today().isoformat()}"
        if self.rehearsal:
            head += "\n\nA rehearsal on the emulator, with tiny nets and PyTorch on the CPU: nothing here is a measurement."
        parts = [head] + [f"### {title}\n\n{body}" for title, body in self.sections.items()]
        if self.goals:
            goals = [[goal, asked, seen, verdict] for goal, (asked, seen, verdict) in self.goals.items()]
            parts.append("### Goals\n\n" + rows.table(["goal", "asked", "seen", "verdict"], *goals))
        parts.append("### Summary\n\n" + rows.table(["part", "outcome", "s", "what was seen"], *outcomes))
        markdown = "\n\n".join(parts) + "\n"
        (self.out / "gpu-check.md").write_text(markdown)
        figures = {"outcomes": self.outcomes, "goals": self.goals, "rehearsal": self.rehearsal} | self.figures
        (self.out / "gpu-check.json").write_text(json.dumps(figures, indent=1))
        return markdown
