"""What scripts/gpu-check.sh does where the GPU is: the parts in the order of their worth, within the time that there is.

Each part adds its findings to the report and may fail without harm to the others. The report is written anew after every part,
so that it is there whatever ends this program.
"""

import argparse
import re
import signal
import sys
import traceback
from pathlib import Path

import correctness
import ranks
import speed
from report import Report
from session import FULL, REHEARSAL, Failed, Partly, Session, Skipped


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binaries", type=Path, required=True, help="what gpu-check.sh --build has made")
    parser.add_argument("--minutes", type=float, default=9.5, help="the end of it all")
    parser.add_argument("--out", type=Path, default=Path("target/gpu-check-results"))
    parser.add_argument("--data", type=Path, help="a folder with fashion-mnist in it")
    parser.add_argument("--only", default="", metavar="REGEX", help="the parts whose names it is found in")
    parser.add_argument("--rehearse", action="store_true", help="on the emulator, with tiny nets; nothing is measured")
    args = parser.parse_args()

    for name in ("trainer", "gpu-tests", "commit"):
        if not (args.binaries / name).exists():
            sys.exit(f"{args.binaries / name} is not there: make it with scripts/gpu-check.sh --build, where Rust is, and bring it along")
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    report = Report(args.out, rehearsal=args.rehearse)
    with Session(args, REHEARSAL if args.rehearse else FULL, report) as session:
        try:
            correctness.environment(session, session.find_gpu())
            cells = speed.cells(session)
            for goal, asked in correctness.goals(session) + speed.goals(cells) + ranks.goals():
                report.expect(goal, asked)
            for name, least_s, part in parts(session, cells):
                if re.search(args.only, name):
                    run(session, name, least_s, part)
        except Failed as error:
            report.outcome("GPU", "failed", str(error))
        finally:
            print(report.write())
    sys.exit(1 if report.has_failures() else 0)


def parts(session, cells):
    """By their worth: is it right, how fast is the main case, do two ranks agree, then the rest. Compiling takes minutes: the first
    of it comes before the tests that the emulator has passed too, the rest late, other batches of AlexNet last."""
    compiled = speed.compiled(cells) if session.sizes.compiled_modes else []
    return (
        correctness.foremost()
        + speed.foremost(cells)
        + correctness.whole_runs()
        + speed.seconds(cells)
        + ranks.parts()
        + correctness.of_the_cpu()
        + compiled[:2]
        + correctness.tests_of_all()
        + speed.others(cells)
        + compiled[2:4]
        + correctness.slow()
        + compiled[4:]
    )


def run(session, name, least_s, part):
    """One part, unless less time is left than it takes at least."""
    report = session.report
    if session.left() < least_s:
        return report.outcome(name, "not reached", f"{session.left():.0f} s were left, it takes {least_s}")
    session.say(f"{name}, with {session.left():.0f} s left")
    start = session.left()
    try:
        found = part(session)
        report.outcome(name, "passed", found or "", start - session.left())
    except Partly as found:
        report.outcome(name, "cut short", str(found), start - session.left())
    except Skipped as reason:
        report.outcome(name, "skipped", str(reason))
    except Failed as error:
        report.outcome(name, "failed", str(error), start - session.left())
    except Exception as error:
        session.log(traceback.format_exc())
        report.outcome(name, "failed", f"in this script: {type(error).__name__}: {error}", start - session.left())
    report.write()


if __name__ == "__main__":
    main()
