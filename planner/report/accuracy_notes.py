"""What a reader should know of single sources before judging their errors."""

from __future__ import annotations

# by source; the figures are those that tests/bench/training.py prints
NOTES = {
    "megatron_a100_single_node": (
        "its steps were put together from layers timed by themselves (0.5 % off that), so they say nothing of "
        "overlap. Some of these times fall where work grows: a layer of hidden size 2048 with tp 4 took 3.0 ms at "
        "microbatch 1 and 2.8 ms at 2; embedding and head take 2.5 to 4.0 times as long with tp 1 as with tp 2, "
        "which halves their work. The closest curves that never fall, one host time for each tp and a line for "
        "each hidden size and tp, leave 2.3 % of the steps on average, 3.1 % of the layers, 19 % of the farthest "
        "one. Steps with the same layer err alike."
    ),
    "megatron_a100_multi_node": (
        "the steps with tp 4 and tp 2 are irregular. The best sum of six terms in layers, microbatches and "
        "tokens, fitted to each tp by itself, leaves 1.1 % of the 26 steps with tp 8, but 7.6 % of the 14 with "
        "tp 4 (at most 15 %), and 4.2 % of the 6 with tp 2, which are no more than its terms."
    ),
}
