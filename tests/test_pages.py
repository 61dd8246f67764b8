"""The demo and the report in a real browser, on a real run."""

import io
import json
import re
import socket
import sys
from dataclasses import replace
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import shapes
from dico_t2i.commands.demo import build, generate, read_conditions, read_drawing, read_settings
from dico_t2i.commands.demo import launch as launch_page
from dico_t2i.config import ConfigError
from dico_t2i.report import write_report
from dico_t2i.sampling.options import Options
from dico_t2i.sampling.pipeline import load_pipeline
from tests import forkserver
from tests.browser import browser
from tests.ports import free_port
from tests.training.conftest import Runs, launch, shapes_data

__all__ = ["shapes_data"]

PROMPT = "a red cross on a grey background"
SETTINGS = [
    "preview.every.steps=4",
    "preview.prompts=[a red circle, a blue <b>square</b>]",
    "preview.sampler.steps=2",
    "sampler.kind=dpm++",
    "sampler.steps=3",
    "validation.every.steps=4",
    "validation.samples=16",
    "validation.bands=2",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, shapes_data):
    held_out = tmp_path_factory.mktemp("held_out") / "data"
    shapes.main(["--out", str(held_out), "--samples", "16", "--size", "16", "--seed", "7"])
    runs = Runs(tmp_path_factory.mktemp("runs"), shapes_data)
    runs.train("tiny", *SETTINGS, f"validation.path={held_out}")
    return runs.folder / "tiny"


@pytest.fixture(scope="module")
def pipeline(run):
    return load_pipeline(run, None, torch.device("cpu"), torch.float32)


@pytest.fixture
def classes(pipeline):
    """As if it took the classes of ImageNet."""
    model = pipeline.config.model.model_copy(update={"condition": "class"})
    return replace(pipeline, config=pipeline.config.model_copy(update={"model": model}))


@pytest.fixture
def demo(run):
    """The address of `dico demo`, comparing the run with its own last checkpoint."""
    port = free_port()
    compared = next((run / "checkpoints").glob("step-*"))
    arguments = ("--checkpoint", str(run), "--compare", str(compared), "--port", str(port))
    process = launch(1, "-m", "dico_t2i", "demo", *arguments)
    for line in process.stdout:
        if line.startswith("demo: "):
            break
    else:
        pytest.fail(f"the demo ended with code {process.wait()}")
    yield line.split()[1]
    process.terminate()
    process.communicate(timeout=30)


def test_the_demo_makes_the_pictures_of_the_pipeline_in_a_browser(demo, pipeline, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    assert demo.startswith("http://127.0.0.1:")
    with browser(tmp_path / "profile") as driver:
        driver.get(demo)
        wait = WebDriverWait(driver, 120)
        prompts = wait.until(lambda d: d.find_element(By.CSS_SELECTOR, "#prompts textarea"))
        prompts.clear()
        prompts.send_keys(PROMPT)
        seed = driver.find_element(By.CSS_SELECTOR, "#seed input")
        seed.clear()
        seed.send_keys("5")
        driver.find_element(By.ID, "generate").click()
        pictures = [
            wait.until(lambda d, n=n: d.find_element(By.CSS_SELECTOR, f"#gallery-{n} img")).get_attribute("src")
            for n in (0, 1)
        ]
        captions = [e.text for e in driver.find_elements(By.CSS_SELECTOR, "#gallery-0 .caption-label")]
        driver.save_screenshot(str(tmp_path / "demo.png"))
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
        hosts = requested_hosts(driver)
    assert captions == [f"seed 5 · {PROMPT}"]
    assert {host for host in hosts if host} == {demo.removeprefix("http://")}
    expected = pipeline.generate([PROMPT], [5], pipeline.config.sampler)[0].permute(1, 2, 0).numpy()
    checkpoints = set()
    for source in pictures:
        shown = Image.open(io.BytesIO(urlopen(source).read()))
        np.testing.assert_array_equal(np.asarray(shown.convert("RGB")), expected)
        checkpoints.add(shown.text.pop("checkpoint"))
        assert shown.text == {"prompt": PROMPT, "seed": "5"}
    assert len(checkpoints) == 2
    policy = urlopen(demo).headers["content-security-policy"]
    assert policy.startswith("default-src 'self'")


def requested_hosts(driver):
    """Of all requests over the network."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    addresses = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    found = [re.match(r"(?:https?|wss?)://([^/]+)", address) for address in addresses]
    return {match[1] for match in found if match}


def test_the_report_draws_everything_in_light_and_dark_and_on_a_telephone(run, tmp_path):
    from selenium.webdriver.common.by import By

    write_report([run], tmp_path / "report.html")
    with browser(tmp_path / "profile", dark=True, size=(500, 900)) as driver:
        driver.get((tmp_path / "report.html").as_uri())
        assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
        width = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1]
        charts = driver.find_elements(By.CSS_SELECTOR, "section .chart")
        titles = [title.text for title in driver.find_elements(By.CSS_SELECTOR, "section .panel h3")]
        assert {
            "Training loss",
            "Validation loss",
            "Gradient norm",
            "t = 250",
            "t = 750",
            "Images/s",
            "Model FLOPs utilisation",
        } <= set(titles)
        assert all(chart.find_elements(By.CSS_SELECTOR, "path.line") for chart in charts)
        driver.find_element(By.ID, "log").click()
        assert all("NaN" not in line.get_attribute("d") for line in driver.find_elements(By.CSS_SELECTOR, "path.line"))
        assert driver.find_element(By.CSS_SELECTOR, "figcaption").text == "tiny, step 8"
        slider = driver.find_element(By.CSS_SELECTOR, ".slider input")
        slider.send_keys("\ue012")  # the left arrow key
        assert driver.find_element(By.CSS_SELECTOR, "figcaption").text == "tiny, step 4"
        assert driver.execute_script("return document.querySelector('figure img').naturalWidth") > 100
        assert driver.get_log("browser") == []


def test_other_sizes_are_those_that_the_network_can_halve(pipeline):
    settings = read_settings(pipeline, "a\n\n b ", 3, 2, 24, 24, "ddim", 2, 1.0)
    assert settings.conditions == ("a", "a", "b", "b")
    assert settings.seeds == (3, 4, 5, 6)
    assert generate(pipeline, settings).shape == (4, 3, 24, 24)
    wide = read_settings(pipeline, "a", 3, 1, 16, 24, "ddim", 2, 1.0)
    assert generate(pipeline, wide).shape == (1, 3, 16, 24)
    with pytest.raises(ConfigError, match="must be divisible by 4"):
        read_settings(pipeline, "a", 3, 1, 18, 16, "ddim", 2, 1.0)


def test_the_editor_gives_an_image_and_a_mask_of_what_is_painted(pipeline):
    background, painted = Image.new("RGB", (16, 16), "red"), Image.new("RGBA", (16, 16))
    assert read_drawing(None) == read_drawing({"background": None, "layers": None}) == (None, None)
    assert read_drawing({"background": background, "layers": [painted]}) == (background, None)
    painted.paste((0, 0, 0, 255), (4, 4, 8, 8))
    image, mask = read_drawing({"background": background, "layers": [painted]})
    assert mask.getbbox() == (4, 4, 8, 8)
    drawing = {"background": background, "layers": [painted]}
    settings = read_settings(pipeline, PROMPT, 0, 1, 16, 16, "ddim", 3, 2.0, " a blue circle ", drawing, 0.7)
    assert settings.options == Options("a blue circle", 16, 16, image, 0.7, mask)
    made = generate(pipeline, settings)[0]
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[4:8, 4:8] = False
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)
    assert torch.equal(made[:, outside], red[:, None].expand(-1, 240))
    assert not torch.equal(made[:, 4:8, 4:8], red[:, None, None].expand(-1, 4, 4))


def test_what_cannot_be_asked_for_is_said(pipeline, classes):
    assert read_conditions("207\ngolden retriever", classes) == [207, 207]
    for text, problem in (
        ("1000", "0 to 999"),
        ("nothing at all", "not a class"),
        (" \n", "Write one or several prompts"),
    ):
        with pytest.raises(ValueError, match=problem):
            read_conditions(text, classes)
    with pytest.raises(ValueError, match="the limit is 64"):
        read_settings(pipeline, "a", 0, 65, 16, 16, "ddim", 2, 1.0)
    with pytest.raises(ValueError, match="0 or more"):
        read_settings(pipeline, "a", -1, 1, 16, 16, "ddim", 2, 1.0)


def test_a_missing_package_is_said_before_anything_is_loaded(run):
    code = "import sys; sys.modules['gradio'] = None; from dico_t2i.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "demo", "--checkpoint", str(run)]
    ended = forkserver.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert "pip install 'dico_t2i[demo]'" in ended.stderr


def test_classes_have_a_page_of_their_own_and_a_port_in_use_is_said(classes):
    page = build({"one": classes, "two": classes})
    named = {block.elem_id: block for block in page.blocks.values()}
    assert {"seed", "size", "gallery-0", "gallery-1"} <= named.keys()
    assert named["prompts"].label.startswith("Classes")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match="--port"):
        launch_page(page, "127.0.0.1", taken.getsockname()[1])
