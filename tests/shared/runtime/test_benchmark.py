"""Models are run on the same samples in turns, and one that fails does not take the others with it."""

from functools import partial
from pathlib import Path

import numpy as np

from shared.formats.model_file import ModelFile
from shared.runtime.benchmark import Protocol, Shown, run_trials
from shared.runtime.processes import ChildError
from shared.runtime.samples import sample_inputs


def test_outputs_and_answers_come_in_the_order_of_the_samples(float_model: Path) -> None:
    samples = [partial(sample_inputs, seed=seed) for seed in (0, 1)]
    protocol = Protocol(samples, runs=3, threads=1, further=[samples[1], samples[0]])
    for interleaved in (True, False):
        one, other = run_trials([ModelFile(float_model), ModelFile(float_model)], protocol, interleaved=interleaved)
        assert isinstance(one, Shown)
        assert isinstance(other, Shown)
        assert (one.measured.runs, len(one.outputs), len(one.answers)) == (3, 2, 2)
        np.testing.assert_array_equal(one.outputs, other.outputs)
        np.testing.assert_array_equal(one.outputs[0], one.answers[1])
        assert (one.outputs[0][0] != one.outputs[1][0]).any()


def test_a_model_that_fails_is_its_error(float_model: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.tflite"
    cut.write_bytes(float_model.read_bytes()[:3000])
    protocol = Protocol([partial(sample_inputs, seed=0)], runs=1, threads=1)
    broken, sound = run_trials([ModelFile(cut), ModelFile(float_model)], protocol, interleaved=True)
    assert isinstance(broken, ChildError)
    assert isinstance(sound, Shown)
