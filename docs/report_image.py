"""The image of a run's report for README.md and docs/report.md: its top, and its map at night.

    python docs/report_image.py runs/quickstart

Needs chromium and chromedriver; writes docs/images/report.png.
"""

import argparse
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from pml_tacl.cli import run_folder as runs
from pml_tacl.report import write_report

WINDOW, HALF = (1134, 823), (850, 617)  # of the browser and of each half, in pixels
ZOOM, NEXT = 4, 3  # keys pressed on the map: closer, and from image to image


def open_browser(profile: Path, size: tuple[int, int] = (1200, 900)) -> Any:
    """Headless Chromium, driven by Selenium, with a window of a size in pixels."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--hide-scrollbars", f"--window-size={size[0]},{size[1]}",
        f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = Service(shutil.which("chromedriver"))
    driver = webdriver.Chrome(service=service, options=options)
    driver.set_page_load_timeout(120)
    driver.set_script_timeout(60)
    return driver


def open_page(driver: Any, path: Path) -> float:
    """Open a report; gives the seconds until its map was drawn, by the browser's own clock."""
    driver.get(path.absolute().as_uri())
    return 1e-3 * driver.execute_async_script(
        "const done = arguments[0];"
        "const look = () => { const [mark] = performance.getEntriesByName('report-ready');"
        "  mark ? done(mark.startTime) : setTimeout(look, 20); }; look();"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder written by quickstart.py")
    parser.add_argument("--out", type=Path, default=Path("docs/images/report.png"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        page = write_report(args.run, Path(scratch) / "report.html")
        driver = open_browser(Path(scratch) / "browser", WINDOW)
        try:
            open_page(driver, page)
            # A window has a frame, of which headless Chromium shows nothing.
            shown = driver.execute_script("return [innerWidth, innerHeight]")
            width, height = (2 * a - b for a, b in zip(WINDOW, shown, strict=True))
            driver.set_window_size(width, height)
            halves = [image_of(driver)]
            driver.find_element("id", "theme").click()
            driver.execute_script("document.querySelectorAll('#map-sets button')[1].click()")
            canvas = driver.find_element("id", "map-canvas")
            driver.execute_script("arguments[0].focus()", canvas)
            canvas.send_keys("+" * ZOOM, "n" * NEXT)
            driver.execute_script(
                "document.getElementById('map-lede').scrollIntoView({behavior: 'instant'});"
                "scrollBy({top: -110, behavior: 'instant'})"  # its heading, below the bar
            )
            halves.append(image_of(driver))
        finally:
            driver.quit()
    whole = Image.new("RGB", (2 * HALF[0], HALF[1]))
    for at, half in enumerate(halves):
        whole.paste(half.resize(HALF, Image.Resampling.LANCZOS), (at * HALF[0], 0))
    whole.save(args.out, optimize=True)
    print(args.out)


def image_of(driver: Any) -> Image.Image:
    driver.execute_async_script(
        "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done));"
    )
    return Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")


if __name__ == "__main__":
    with runs.one_line_errors():
        main()
