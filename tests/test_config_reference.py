"""docs/config.md says what dico_t2i/config/ says."""

import sys
from pathlib import Path

from tests import forkserver

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_up_to_date():
    script = ROOT / "docs" / "make_config_reference.py"
    done = forkserver.run([sys.executable, str(script), "--check"], check=False)
    assert done.returncode == 0, "run: python docs/make_config_reference.py"


def test_every_key_and_its_comment_is_there():
    from dico_t2i.config import Config, Section

    page = (ROOT / "docs" / "config.md").read_text()

    def keys(section):
        for name, field in section.model_fields.items():
            yield field.alias or name
            options = [field.annotation, *getattr(field.annotation, "__args__", ())]
            for inner in options:
                if isinstance(inner, type) and issubclass(inner, Section):
                    yield from keys(inner)

    assert not [key for key in keys(Config) if f"| `{key}` |" not in page]
    comment = "The largest gradient norm, to which larger ones are scaled down; 0 turns clipping off."
    assert f"| `clip` | number >= 0 | `0.0` | {comment} |" in page
    comment = "a local folder, the URL of a folder, or a hub id; for open_clip, an architecture such as ViT-L-14."
    assert f"For t5 and transformers, {comment}" in page
    sections = page[page.index("| key | type |") :]
    rows = [line for line in sections.splitlines() if line.startswith("| `")]
    assert not [row for row in rows if not row.rstrip(" |").endswith(".")], "every key needs a sentence"
