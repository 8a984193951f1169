"""Generated graphs are quantized without an exception, load, and keep their answers; 200 of them with `--rounds 50`."""

from pathlib import Path

import pytest

from shared.metrics.output_error import measure_errors
from tests.support.small_onnx import answer
from tests.tools.quantize_onnx.graph.generated import draw, samples
from tests.tools.quantize_onnx.graph.graphs import product_of

GRAPHS, EACH_ROUND = 200, 6
LARGEST_ERROR = 0.05  # of an output over all samples
CALIBRATED, HELD = 32, 4  # samples; of few ones the ranges are too narrow for others


@pytest.mark.parametrize("mode", ["static", "static, QOperator", "dynamic", "fp16"])
def test_a_generated_graph_keeps_its_answers(mode: str, rounds: int, tmp_path: Path) -> None:
    wrong = []
    for seed in range(min(GRAPHS, EACH_ROUND * rounds)):
        source = draw(tmp_path / f"{seed}.onnx", seed)
        product = product_of(source, tmp_path / "work", mode, samples(CALIBRATED, 1000 + seed))
        held = samples(HELD, seed)
        pairs = [(answer(source, **sample), answer(product, **sample)) for sample in held]
        names = [f"graph {seed}, output {number}" for number in range(len(pairs[0][0]))]
        found = measure_errors(names, [before for before, _ in pairs], [after for _, after in pairs])
        wrong += [str(error) for error in found if error.problem or (error.mean_error or 0) > LARGEST_ERROR]
    assert not wrong
