"""Draws docs/images/viewer.png: the viewer in headless Chromium, on what `exaonepath demo` made.

exaonepath demo --out demo-output && python docs/draw_viewer.py demo-output
"""

import io
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

TARGET = Path(__file__).parent / "images" / "viewer.png"
SIZE = (1440, 1010)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--use-angle=swiftshader"]
COLOURS = 255  # of the stored picture


def main(out: str) -> None:
    command = [sys.executable, "-m", "exaonepath", "view", out, "--no-browser"]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = program.stdout.readline().strip()
        with sync_playwright() as playwright:
            chromium = os.environ.get("EXAONEPATH_CHROMIUM") or shutil.which("chromium")
            browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
            page = browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]})
            page.goto(url)
            page.wait_for_selector("#legend p")
            page.wait_for_timeout(1500)
            box = page.locator("#panes").bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.keyboard.press("d")
            page.mouse.move(x + 150, y - 150)
            page.mouse.down()
            for degree in range(8, 361, 8):
                turn = math.radians(degree)
                wave = 1 + 0.08 * math.sin(3 * turn)
                page.mouse.move(x + 60 + 90 * wave * math.cos(turn), y - 150 + 105 * wave * math.sin(turn))
            page.mouse.up()
            page.keyboard.type("Region A")
            page.keyboard.press("Escape")
            page.evaluate("document.activeElement.blur()")
            page.keyboard.press("v")
            page.mouse.click(x - 62, y + 40)
            page.wait_for_selector("#similar .tiles img")
            page.mouse.move(x - 62, y + 42)
            page.evaluate("window.exaonepath.setOpacity(50)")
            page.wait_for_timeout(2500)
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            browser.close()
    finally:
        program.terminate()
        program.wait(20)
    picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).save(
        TARGET, optimize=True
    )
    print(TARGET)


if __name__ == "__main__":
    main(sys.argv[1])
