"""Commands for pictures of classes, each with the file that shows that it is done."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.real.prompts import FREE_TEMPLATES, SYNONYMS, class_prompts

PICTURES = "pictures"  # the folder of a run's judged samples; "samples" has the previews of its training


@dataclass(frozen=True)
class Stage:
    """A command, and the file whose existence shows that it is done; None if the command decides itself."""

    name: str
    command: list[str]
    result: Path | None = None


@dataclass(frozen=True)
class Judging:
    """What pictures of classes are judged with: image shards of both splits, and the file of the classifier.

    loss_samples: samples that the loss is measured on.
    """

    train: Path
    test: Path
    classifier: Path
    loss_samples: int = 1024

    def stage(self, run: Path, *, free: bool) -> Stage:
        """Judges the samples of a run, and those of words that were never trained if there are any (``free``)."""
        command = ["evals/judge_classes.py", "--images", str(run / PICTURES), "--checkpoint", str(run)]
        command += ["--train", str(self.train), "--test", str(self.test), "--classifier", str(self.classifier)]
        command += ["--loss-samples", str(self.loss_samples), *(["--free", str(run / "free")] if free else [])]
        result = run / "judged.json"
        return Stage("judge", [*command, "--out", str(result)], result)


def sample_classes(run: Path, pictures: int) -> Stage:
    """Samples about as many pictures of each of the ten classes of a class-conditional run."""
    return _sample(run, PICTURES, ["--labels", *map(str, range(10)), "--per-prompt", str(max(1, pictures // 10))])


def sample_prompts(run: Path, name: str) -> Stage:
    """Samples the prompts in the run's file NAME.txt into its folder NAME."""
    return _sample(run, name, ["--prompts", str(run / f"{name}.txt")])


def _sample(run: Path, name: str, asked: Sequence[str]) -> Stage:
    command = ["-m", "dico_t2i", "sample", "--checkpoint", str(run), "--out", str(run / name)]
    return Stage(name, [*command, *asked, "--batch", "50"], run / name / "grid.png")


def write_class_prompts(run: Path, pictures: int, free: int) -> None:
    """Write the prompts of classes, and those in words that were never trained, to pictures.txt and free.txt."""
    write_prompts(run / f"{PICTURES}.txt", class_prompts(pictures, list(SYNONYMS)))
    write_prompts(run / "free.txt", class_prompts(free, list(SYNONYMS.values()), FREE_TEMPLATES))


def write_prompts(path: Path, prompts: Sequence[str]) -> None:
    path.write_text("\n".join(prompts) + "\n", encoding="utf-8")
