"""Runs that are killed: ``python -m tests.crash --seeds 0:1000 --jobs 2``, or ``--points`` at every point with a name.

Prints what was broken, with the command that plays it again, and the folder that it left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.crash.harness import Broken, Kill, Scene, at_point, play, warm_up
from tests.crash.plans import NAMED, make
from tests.crash.points import CALL_POINTS, EVENT_POINTS, Point

ROOT = Path(__file__).parents[2]


def named_plans(folder: Path) -> dict[str, list[str]]:
    """Which events each plan with a name has when nobody kills it."""
    scenes = {name: Scene(folder / name, make(name)) for name in NAMED}
    for scene in scenes.values():
        scene.prepare()
    return {name: list(scene.whole["kinds"]) for name, scene in scenes.items()}


def work(todo: list[str], kills: list[Kill] | None, folder: Path) -> Iterator[dict[str, Any]]:
    """Play these seeds, plans or points one by one, and say what came of each."""
    warm_up()
    kinds = named_plans(folder / "plans") if any(":" in each for each in todo) else {}
    for each in todo:
        begun, here = time.monotonic(), folder / each.replace(":", "-")
        said: dict[str, Any] = {"of": each}
        try:
            seed, fate = at_point(each, kinds) if ":" in each else (each, kills)
            said["died"] = play(here, seed, fate).died
        except Broken as broken:
            said |= {"broken": str(broken), "folder": str(here), "again": f"uv run python -m tests.crash --only {each}"}
        yield {**said, "took_s": round(time.monotonic() - begun, 3)}


def share(todo: list[str], jobs: int, folder: Path, kills: list[Kill] | None = None) -> list[dict[str, Any]]:
    """Have so many processes do it, and return what they say."""
    folder.mkdir(parents=True, exist_ok=True)
    fates = [part for kill in kills or () for part in ("--kill", str(kill.point))]
    command = [sys.executable, "-m", "tests.crash", "--worker", *fates]
    workers = []
    for number in range(min(jobs, len(todo))):
        mine = [*command, "--folder", str(folder / str(number)), "--only", ",".join(todo[number::jobs])]
        workers.append(subprocess.Popen(mine, stdout=subprocess.PIPE, text=True, cwd=ROOT))
    said: list[dict[str, Any]] = []
    for worker in workers:
        out, _ = worker.communicate()
        said += [json.loads(line) for line in out.splitlines()]
    done = {one["of"] for one in said}
    return said + [{"of": each, "broken": "whoever played it died", "again": "", "folder": ""} for each in todo
                   if each not in done]  # fmt: skip


def summary(said: list[dict[str, Any]]) -> str:
    """What was broken, and how many deaths there were."""
    broken = [one for one in said if "broken" in one]
    lines = [f"{one['of']}: {one['broken']}\n  again: {one['again']}\n  left: {one['folder']}" for one in broken]
    deaths = Counter(kill.partition("#")[0].partition(" after ")[0] for one in said for kill in one.get("died", ()))
    total = f"{len(said)} runs, {deaths.total()} deaths at {len(deaths)} places, {len(broken)} broken"
    return "\n".join([*lines, total])


def scratch() -> Path:
    """A folder in memory where there is one: it is processes that die here, not disks."""
    return Path(tempfile.mkdtemp(prefix="cm-crash-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))


def main() -> int:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("--seeds", default="0:1000", help="the runs of these seeds, such as 0:1000")
    parser.add_argument("--points", action="store_true", help="one run for each point with a name, instead")
    parser.add_argument("--only", help="these seeds, plans or points, instead: 17,gates,mid:GateDecided")
    parser.add_argument("--kill", type=Point.read, action="append", help="where it dies, such as mid:GateDecided#2")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    first, _, last = given.seeds.partition(":")
    todo = [str(number) for number in range(int(first), int(last))]
    if given.points:
        todo = [*EVENT_POINTS, *CALL_POINTS]
    elif given.only:
        todo = given.only.split(",")
    kills = [Kill(point=point) for point in given.kill] if given.kill else None
    folder = given.folder or scratch()
    if given.worker:
        for one in work(todo, kills, folder):
            print(json.dumps(one), flush=True)
        return 0
    begun = time.monotonic()
    said = share(todo, given.jobs, folder, kills)
    print(f"{summary(said)}, {time.monotonic() - begun:.0f} s")
    broken = any("broken" in one for one in said)
    if not broken:
        shutil.rmtree(folder)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
