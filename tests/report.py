#!/usr/bin/env python3
"""Adds up the parts of `./x test`: what was left out and why, then one line, `N passed, N failed`.

    report.py FOLDER PART...

FOLDER holds, for each part, PART.status (the exit status of its runner), PART.log and, except for the doc tests, PART.xml
(JUnit). A runner that failed without a failed test (it did not compile, say) counts as one failure, so the total is
never clean by accident. Exits with 1 if anything failed.
"""

import collections
import pathlib
import re
import sys
import xml.etree.ElementTree as ElementTree

ANSI = re.compile(r"\x1b\[[0-9;]*m")
DOC_RESULT = re.compile(r"^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored", re.MULTILINE)
# nextest's JUnit file leaves ignored tests out; its summary counts them.
NEXTEST_SKIPPED = re.compile(r"^\s*Summary \[.*?\b(\d+) skipped", re.MULTILINE)
# A Rust test whose file is not on this machine says so on stderr, and passes.
SELF_SKIPPED = re.compile(r"^\s*skip(?:ped|ping|s)?\b[:\s]*(.*)", re.MULTILINE | re.IGNORECASE)


class Part:
    """The outcome of one part: counts, and the reasons of what was skipped."""

    def __init__(self):
        self.passed = self.failed = 0
        self.skipped = collections.Counter()


def junit(path, part):
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        skipped = case.find("skipped")
        if skipped is not None:
            part.skipped[skipped.get("message") or "no reason given"] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            part.failed += 1
        else:
            part.passed += 1
            said = SELF_SKIPPED.search(case.findtext("system-err") or "")
            if said:
                part.passed -= 1
                part.skipped[said.group(1).strip() or "no reason given"] += 1


def read(folder, name):
    part = Part()
    log = ANSI.sub("", (folder / f"{name}.log").read_text(errors="replace"))
    if name == "doc":
        for passed, failed, ignored in DOC_RESULT.findall(log):
            part.passed += int(passed)
            part.failed += int(failed)
            part.skipped["ignored"] += int(ignored)
    elif (folder / f"{name}.xml").exists():
        junit(folder / f"{name}.xml", part)
    if name == "rust":
        for count in NEXTEST_SKIPPED.findall(log):
            part.skipped["ignored"] += int(count)
    status = int((folder / f"{name}.status").read_text())
    if status != 0 and part.failed == 0:
        print(f"{name}: the runner itself failed with status {status}, see its output above")
        part.failed = 1
    return part


def main():
    folder, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
    passed = failed = 0
    print()
    for name in names:
        part = read(folder, name)
        skipped = sum(part.skipped.values())
        print(f"{name}: {part.passed} passed, {part.failed} failed" + (f", {skipped} skipped" if skipped else ""))
        for reason, count in part.skipped.items():
            if count:
                print(f"    skipped {count}: {reason[:160]}")
        passed += part.passed
        failed += part.failed
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or passed == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
