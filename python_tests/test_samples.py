"""Samples and their micro-batches: what counts, where it is predicted, and what goes with it."""

import pytest
import torch

from bupo import progress
from bupo.samples import Sample, micro_batches


def two_turns() -> Sample:
    """Prompt 5 6; answer 7 8; a tool says 1 2 3; answer 9."""
    mask = [False, False, True, True, False, False, False, True]
    return Sample([5, 6, 7, 8, 1, 2, 3, 9], mask, streams={"old": torch.tensor([0.1, 0.2, 0.3])})


def test_a_batch_has_each_counted_token_and_what_predicts_it() -> None:
    other = Sample.of([4], [5, 6]).with_stream("old", torch.tensor([1.0, 2.0]))
    (batch,) = micro_batches([two_turns(), other], 100, "cpu", pad=99)
    assert batch.members == [1, 0], "the longest last"
    assert batch.input_ids.tolist() == [[4, 5, 6] + [99] * 5, [5, 6, 7, 8, 1, 2, 3, 9]]
    assert batch.attention_mask.sum(1).tolist() == [3, 8]
    assert batch.targets.tolist() == [5, 6, 7, 8, 9]
    assert batch.input_ids[batch.rows, batch.columns].tolist() == [4, 5, 6, 7, 3]
    assert batch.streams["old"].tolist() == pytest.approx([1.0, 2.0, 0.1, 0.2, 0.3])
    assert [part.tolist() for part in batch.split(batch.targets)] == [[5, 6], [7, 8, 9]]


def test_a_stream_that_one_sample_lacks_is_not_in_their_batch() -> None:
    (batch,) = micro_batches([two_turns(), Sample.of([1], [2])], 100, "cpu")
    assert batch.streams == {}
    with pytest.raises(KeyError, match="expected value, got old"):
        two_turns().stream("value")


def test_samples_of_equal_length_need_no_padding() -> None:
    samples = [Sample.of([1], [2] * n) for n in (3, 1, 3, 2)]
    batches = list(micro_batches(samples, 100, "cpu", equal_lengths=True))
    assert [batch.members for batch in batches] == [[1], [3], [0, 2]]
    assert all(batch.attention_mask.all() for batch in batches)
    by_size = micro_batches(samples, 8, "cpu")
    assert [batch.members for batch in by_size] == [[1, 3], [0, 2]]


@pytest.mark.parametrize(
    ("mask", "streams", "message"),
    [
        ([False, True], {}, "loss_mask: expected 3 values, one per token, got 2"),
        ([True, True, True], {}, "expected the first token to be masked"),
        ([False, True, True], {"old": torch.zeros(3)}, r"old: expected shape \[2\].*got \[3\]"),
    ],
)
def test_what_does_not_fit_together_is_no_sample(
    mask: list[bool], streams: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Sample([1, 2, 3], mask, streams=streams)


def test_parts_of_some_work_report_to_its_watcher() -> None:
    seen: list[float] = []
    progress.report(0.5)  # nobody watches
    with progress.watched_by(seen.append):
        progress.report(0.1)
        with progress.part(0.2, 0.6):
            progress.report(0.5)
        progress.report(1.0)
    assert seen == pytest.approx([0.1, 0.4, 1.0])
