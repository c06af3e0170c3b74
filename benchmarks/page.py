"""The report page of a made-up sweep: its size beside plotly.min.js, and how long Chromium takes to open it.

    python benchmarks/page.py [--arms 8] [--problems 400] [--characters 1300] [--repeats 5] [--keep folder]

A sweep of `--arms` rules and three seeds over problems with five candidates each. Times are Chromium's own, in ms from
the beginning of the navigation, each the median of `--repeats` fresh openings: first contentful paint (tables), listed
(the trajectories can be searched and read), opened (also plotly.min.js is loaded, and the plots of the first screen are
drawn), and the last plot drawn, which the page does when nothing else is to do. The aims are 3 MB and opened in 2 s.
The main thread's own time until then does not depend on what else the machine is doing, and is what decides.
"""

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sweeps import RULES, write_sweep

from lark.comparison.summaries import read_summaries
from lark.page.write import NAME, PLOTLY, write_page

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
browser = importlib.import_module("browser")

MEGABYTES, SECONDS = 3.0, 2.0
OWN = "main thread until opened"
TIMES = """() => ({
    "first paint": performance.getEntriesByName("first-contentful-paint")[0].startTime,
    listed: performance.getEntriesByName("listed")[0].startTime,
    opened: performance.getEntriesByName("opened")[0].startTime,
    "all drawn": performance.getEntriesByName("drawn")[0].startTime,
})"""


def main() -> None:
    about = __doc__.splitlines()[0] if __doc__ else ""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--arms", type=int, default=8, choices=range(2, len(RULES) + 1))
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--characters", type=int, default=1300, help="of a trajectory, on average")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="a folder to leave the sweep and its page in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        rules, characters = RULES[: arguments.arms], arguments.characters
        write_sweep(folder, rules=rules, problems=arguments.problems, characters=characters)
        start = time.perf_counter()
        page = write_page(read_summaries([folder]), folder / NAME)
        print(f"written in {time.perf_counter() - start:.1f} s from {(arguments.arms - 1) * 3} runs")
        size = page.stat().st_size / 1e6
        print(f"{size:.2f} MB beside {PLOTLY} of {(folder / PLOTLY).stat().st_size / 1e6:.2f} MB")
        found: dict[str, list[float]] = {}
        with browser.launched() as chromium:
            for _ in range(arguments.repeats):
                for name, value in times(chromium, page).items():
                    found.setdefault(name, []).append(value)
        medians = {name: statistics.median(values) for name, values in found.items()}
        print(", ".join(f"{name} {value:,.0f} ms" for name, value in medians.items()))
        sys.exit(int(size >= MEGABYTES or medians[OWN] >= 1000 * SECONDS))


def times(chromium: Any, page: Path) -> dict[str, float]:
    """Of one opening, ms."""
    context = chromium.new_context(viewport=browser.DESKTOP)
    tab = context.new_page()
    session = context.new_cdp_session(tab)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    tab.goto(page.absolute().as_uri())
    tab.wait_for_selector("html[data-page=opened], html[data-page=drawn]", state="attached")
    metrics = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    tab.wait_for_selector("html[data-page=drawn]", state="attached")
    found = tab.evaluate(TIMES) | {OWN: 1000 * metrics["TaskDuration"]}
    context.close()
    return found


if __name__ == "__main__":
    main()
