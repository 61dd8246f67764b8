import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from PIL import Image

from dico_t2i.report import write_report
from dico_t2i.report.record import PICTURES, read_record

ATTACK = '</script><script>alert(1)</script><img src=x onerror=alert(2)>{{data}}"&'


class Tags(HTMLParser):
    """Counts tags, collects text and addresses."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.addresses = {}, [], []

    def handle_starttag(self, tag, attributes):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]

    def handle_data(self, data):
        self.text.append(data)


def run_folder(folder, name, lr=1e-4, said="fine"):
    path = folder / name
    (path / "samples").mkdir(parents=True)
    (path / "starts").mkdir()
    config = {"name": name, "optimizer": {"lr": lr}, "train": {"global_batch": 8}, "preview": {"prompts": [said]}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    start = {"command": said, "commit": "abc", "ranks": 2, "packages": {"torch": "2.15"}, "time": "2026"}
    (path / "starts" / "0000.json").write_text(json.dumps(start))
    lines = [{"step": 0, "time": 1.0, "event": "start", "message": said, "total_steps": 20, "parameters": 5e6}]
    for step in range(1, 21):
        lines.append({"step": step, "time": 1.0 + step, "loss": 1 / step, "vb": 0.0, said: 1.0})
    lines.append({"step": 20, "time": 30.0, "val_loss": 0.3, "val_loss_t125": 0.2, "val_loss_t875": 0.4})
    lines.append({"step": 20, "time": 31.0, "event": said, "message": said})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (10, 20):
        Image.new("RGB", (3000, 40), (step, 0, 0)).save(path / "samples" / f"step-{step:08d}.png")
    (path / "samples" / "step-00000015.png").write_bytes(b"not a picture")
    return path


def evaluated(path, step, fid, comparable=True):
    file = path / "evals" / "coco" / f"{step:08d}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"step": step, "images": 30, "protocol": {"name": "coco"}, "protocol_hash": "ab12"}
    content |= {"comparable": comparable, "changes": [] if comparable else ["fewer images"], "doubts": []}
    file.write_text(json.dumps({**content, "numbers": {"fid": fid, "kid_std": 1.0}, "standard_errors": {"fid": 0.5}}))


def parsed(page):
    tags = Tags()
    tags.feed(page)
    return tags


def payload(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_one_page_that_needs_nothing_else(tmp_path):
    a, b = run_folder(tmp_path, "a"), run_folder(tmp_path, "b", lr=2e-4)
    for step, fid in ((10, 9.5), (20, 7.25)):
        evaluated(a, step, fid)
    evaluated(b, 20, 8.0, comparable=False)
    out = tmp_path / "new" / "report.html"
    write_report([a, b], out)
    page = out.read_text()
    tags, data = parsed(page), payload(page)
    assert tags.addresses == []
    assert not re.search(r"url\(['\"]?(?!#)|@import|fetch\(|XMLHttpRequest|import\(", page.replace("url(#${clip})", ""))
    text = " ".join(tags.text)
    for said in ("20 of 20", "160", "7.2500 ± 0.5", "fewer images", "5.0M", "torch 2.15", "optimizer.lr"):
        assert said in text, said
    keys = [panel["key"] for panel in data["panels"]]
    assert keys[:4] == ["loss", "val_loss", "val_loss_t125", "val_loss_t875"]
    assert "evaluation/coco ab12/fid" in keys
    assert "vb" not in keys  # it is zero throughout
    assert data["runs"][0]["curves"]["evaluation/coco ab12/fid"] == [[10, 9.5], [20, 7.25]]
    pictures = data["runs"][0]["pictures"]
    assert [(p["step"], p["width"]) for p in pictures] == [(10, 1024), (20, 1024)]


def test_nothing_that_a_run_says_becomes_part_of_the_page(tmp_path):
    harmless, harmful = run_folder(tmp_path, "a"), run_folder(tmp_path, "b", said=ATTACK)
    config = yaml.safe_load((harmful / "config.yaml").read_text())
    (harmful / "config.yaml").write_text(yaml.safe_dump({**config, "name": "a"}))
    write_report([harmless], tmp_path / "a.html")
    write_report([harmful], tmp_path / "b.html")
    pages = [parsed((tmp_path / f"{name}.html").read_text()) for name in "ab"]
    assert pages[0].tags == pages[1].tags
    assert any(ATTACK in text for text in pages[1].text)


def test_many_pictures_are_thinned_out(tmp_path):
    path = run_folder(tmp_path, "a")
    for step in range(100, 300):
        Image.new("RGB", (8, 8)).save(path / "samples" / f"step-{step:08d}.png")
    steps = [picture.step for picture in read_record(path).pictures]
    assert len(steps) in (PICTURES, PICTURES - 1)  # the file that is no picture may be among those chosen
    assert (steps[0], steps[-1]) == (10, 299)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a run folder"):
        write_report([tmp_path], tmp_path / "report.html")
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="cannot be read"):
        write_report([tmp_path], tmp_path / "report.html")
