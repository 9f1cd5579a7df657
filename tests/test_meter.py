import pytest
import torch

from utils.distributed import Ranks
from utils.meter import Meter, NonFiniteError

ONE = Ranks(0, 1, torch.device("cpu"))


def test_means_since_the_last_reading():
    meter = Meter(["loss", "norm"], ONE)
    for step, (loss, norm) in enumerate([(1.0, 10.0), (3.0, 20.0)], 1):
        assert not meter.record(step, loss=torch.tensor(loss), norm=torch.tensor(norm))
    assert meter.read() == {"loss": 2.0, "norm": 15.0}
    meter.record(3, loss=torch.tensor(7.0), norm=torch.tensor(1.0))
    assert meter.read() == {"loss": 7.0, "norm": 1.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_first_bad_step_is_named_and_every_later_update_forbidden(bad):
    meter = Meter(["loss", "norm"], ONE)
    told = [bool(meter.record(step, loss=torch.tensor(loss), norm=torch.tensor(0.25 * step)))
            for step, loss in enumerate([1.0, bad, 2.0, float("nan")], 5)]
    assert told == [False, True, True, True]
    with pytest.raises(NonFiniteError, match=rf"step 6 is not finite: loss={bad:.6g}, norm=1.5"):
        meter.read()


def test_a_bad_part_is_enough():
    meter = Meter(["loss", "norm"], ONE)
    assert meter.record(1, loss=torch.tensor(1.0), norm=torch.tensor(float("inf")))
    with pytest.raises(NonFiniteError, match=r"step 1 .*loss=1, norm=inf"):
        meter.read()


def test_other_ranks_count_and_the_first_bad_step_of_any_is_named(monkeypatch):
    def read_both(*steps_and_losses):
        """Two meters, of which the second reads what the first would have sent."""
        meters, sent = [Meter(["loss"], ONE) for _ in steps_and_losses], []
        for meter, recorded in zip(meters, steps_and_losses):
            for step, loss in recorded:
                meter.record(step, loss=torch.tensor(loss))
        monkeypatch.setattr(Ranks, "gather", lambda self, values: sent.append(values) or torch.zeros(1, len(values)))
        meters[0].read()
        monkeypatch.setattr(Ranks, "gather", lambda self, values: torch.stack([*sent, values]))
        return meters[1].read()

    nan = float("nan")
    assert read_both([(1, 1.0), (2, 2.0)], [(1, 4.0), (2, 5.0)]) == {"loss": 3.0}
    for first, second in ((3, 2), (2, 3), (None, 2), (2, None)):
        recorded = [[(step, nan if step == bad else 1.0) for step in (1, 2, 3)] for bad in (first, second)]
        with pytest.raises(NonFiniteError, match="step 2 is not finite"):
            read_both(*recorded)
