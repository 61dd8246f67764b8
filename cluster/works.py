"""Jobs other than training: scripts of the repository, which are started again if SLURM stops them."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import DelayedSubmission

from cluster.state import complete_checkpoints, read_state


@dataclass(frozen=True)
class ScriptJob:
    """Runs ``python ARGUMENTS`` to its end. The script itself must be able to resume where it stopped."""

    arguments: tuple[str, ...]

    def __call__(self) -> None:
        """Run the script, and exit with its code if that is not 0; its output goes to the job's log."""
        code = subprocess.run([sys.executable, "-u", *self.arguments], check=False).returncode
        if code:
            print(f"python {' '.join(self.arguments)}: exit code {code}", file=sys.stderr)
            sys.exit(code)

    def checkpoint(self) -> DelayedSubmission:
        """The job that submitit queues again at the time limit."""
        return DelayedSubmission(self)


@dataclass(frozen=True)
class EvaluationJob:
    """Runs a script on the newest checkpoint, or on each one that appears."""

    run: str
    name: str
    arguments: tuple[str, ...]  # with {checkpoint} and {out}
    follow: bool
    poll_s: float = 10.0

    def __call__(self) -> None:
        """Evaluate the checkpoints, and exit with code 1 if a script failed; the others are still evaluated."""
        failed: set[str] = set()
        while True:
            over = not self.follow or read_state(Path(self.run)).word == "done"  # before looking: none comes after it
            waiting = [path for path in self._checkpoints() if path.name not in failed and not self._done(path)]
            failed |= {path.name for path in waiting if not self._evaluate(path)}
            if over:
                break
            time.sleep(self.poll_s)
        if failed:
            print(f"not evaluated: {', '.join(sorted(failed))}", file=sys.stderr)
            sys.exit(1)

    def checkpoint(self) -> DelayedSubmission:
        """The job that submitit queues again at the time limit."""
        return DelayedSubmission(self)

    def _checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first; only the newest one unless following."""
        found = complete_checkpoints(Path(self.run))
        if not found and not self.follow:
            sys.exit(f"{self.run}: no complete checkpoint to evaluate")
        return found if self.follow else found[-1:]

    def _out(self, checkpoint: Path) -> Path:
        return Path(self.run) / self.name / checkpoint.name

    def _done(self, checkpoint: Path) -> bool:
        return (self._out(checkpoint) / ".done").exists()

    def _evaluate(self, checkpoint: Path) -> bool:
        """Run the script; False if it failed, unless retention has deleted the checkpoint meanwhile."""
        out = self._out(checkpoint)
        out.mkdir(parents=True, exist_ok=True)
        filled = [part.replace("{checkpoint}", str(checkpoint)).replace("{out}", str(out)) for part in self.arguments]
        with (out / "log.txt").open("a") as log:
            code = subprocess.run([sys.executable, "-u", *filled], stdout=log, stderr=log, check=False).returncode
        print(f"{checkpoint.name}: {'done' if code == 0 else f'exit code {code}, see {out}/log.txt'}", flush=True)
        if code == 0:
            (out / ".done").touch()
        return code == 0 or not (checkpoint / "manifest.json").exists()
