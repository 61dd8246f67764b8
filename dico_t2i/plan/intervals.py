"""Formulas for runs that fail at random: the best interval between checkpoints, and the time lost on average.

All times are in seconds. ``mtbf``: the mean time between two failures, which come at a constant rate.
"""

import math


def young_interval(save: float, mtbf: float) -> float:
    """The best time of training between two saves to first order. J. W. Young, Communications of the ACM 17(9), 1974.

    save: for how long each save pauses training.
    """
    return math.sqrt(2 * save * mtbf)


def daly_interval(save: float, mtbf: float) -> float:
    """The same to higher order. J. T. Daly, Future Generation Computer Systems 22(3), 2006."""
    if save >= 2 * mtbf:
        return mtbf
    ratio = save / (2 * mtbf)
    return young_interval(save, mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def expected_goodput(work: float, save: float, mtbf: float, start: float, wait: float) -> float:
    """The share of time that is spent on training steps that are kept, in a long run.

    work: training between two saves. start: from the beginning of a job to its first step, in which it may fail. wait:
    from a failure to the next beginning. E is the mean time until a stretch of work + save is complete, and F the same
    from the beginning of a job: E = (1 - q) (M + wait + F) and F = (exp(start / M) - 1) (M + wait) + E, where M is
    ``mtbf`` and q = exp(-(work + save) / M). Without ``wait`` the solution is Daly's equation for the total time.
    """
    stretch = math.expm1((work + save) / mtbf) * (mtbf + wait) * math.exp(start / mtbf)
    return work / stretch
