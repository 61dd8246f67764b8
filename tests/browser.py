"""A headless Chromium for tests that look at pages as a user does."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_PROGRAMS = ("chromium", "chromedriver")
_QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
)


@contextmanager
def browser(profile: Path, dark: bool = False, size: tuple[int, int] = (1300, 1200)) -> Iterator[Any]:
    """A selenium driver that keeps the console's messages and the addresses of all requests.

    profile: a new folder. Skips the test where Chromium is not installed, but not in CI.
    """
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing and "CI" not in os.environ:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: chromium and chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    for argument in (*_QUIET, scheme, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()
