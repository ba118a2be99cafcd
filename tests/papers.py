# ruff: noqa: E501 (a paper a line)
"""The reading list of the field, paper by paper: its form here, where, and which tests prove it.

`python tests/papers.py` writes docs/understand/papers.md. State: "works" (what has a form
here is in code, and tested), "open" (it has a form here, which is not built), "none" (it has no
form in a frozen bidirectional transformer).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "understand" / "papers.md"
STATES = ("works", "open", "none")


class Paper(NamedTuple):
    """name: of the paper's method. form: its idea, and what it is here, in a line. file: where.
    tests: "file::function" that prove it."""

    name: str
    state: str
    form: str
    file: str = ""
    tests: tuple[str, ...] = ()


_SUB = "kernels/block_table/sub.py"
_PARTS = "tests/kernels/test_part_scores.py::"
_REUSE = "tests/methods/test_reuse.py::"
_WINDOWS = "tests/methods/test_windows.py::"
_STATIC, _STATICS = "dit_accel/methods/selectors/static.py", "tests/methods/test_static.py::"
_SCORED = "tests/methods/test_scored.py::"
_REGIONS = "dit_accel/methods/selectors/regions.py"
_RELATIVE = "dit_accel/methods/selectors/relative.py"
_SORTS = "tests/methods/test_sorts.py::"
_BRANCH = "dit_accel/methods/branches/"
_BRANCHES = "tests/methods/test_branches.py::"
_EQUATION = _BRANCHES + "test_each_branch_is_its_equation_forward_and_backward"
_LEARNS = "tests/finetune/test_student.py::test_a_branch_learns_every_tensor"
_ROUTER, _ROUTES = "dit_accel/methods/selectors/learned.py", "tests/methods/test_learned.py::"
_PROFILE = "tests/test_profile.py::"
_LINEAR = "tests/kernels/test_sparse_linear_triton.py::"
_POOLED = "tests/kernels/test_compensation.py::"
_RING = "tests/test_ring.py::test_two_processes_give_what_one_gives"
_ULYSSES = "tests/test_ulysses.py::test_two_processes_give_what_one_gives"

PAPERS = (
    Paper("TPLA", "none", "splits the latent of a KV cache over devices; a diffusion step keeps no cache"),
    Paper("TPI-LLM", "works", "weights on the host, a window of blocks on the device, the next one arriving while one runs: `--offload blocks`, diffusers' group offload, with every method: a Wan 14B step at 720p in 9.9 instead of 34.9 GiB, 13 % longer; its all-reduce over slow links is for tensor parallelism, which is left to diffusers", "dit_accel/generation/offload.py", ("tests/test_offload.py::test_every_method_gives_the_same_bits", "tests/test_offload.py::test_every_block_comes_and_goes", "tests/test_offload.py::test_the_wait_for_weights_is_told")),
    Paper("Lightning Attention", "works", "exact inside of blocks, states between them, whose weights decay with the distance of blocks in the picture instead of in time: `decay`, in plain torch; without a decay the fused kernels; `decay`, trained for 200 steps, level in clips with the plain branch", _BRANCH + "decay.py", (_EQUATION, _BRANCHES + "test_a_steep_decay_leaves_the_own_block_and_the_text", _LINEAR + "test_the_projected_state_of_all_keys")),
    Paper("MiniCPM-SALA", "works", "sparse and linear layers in turn, converted by training: `SLA(linear_layers=…)`, those that a profile finds nearest to linear attention; 200 steps do not recover the embedded model", "dit_accel/methods/sla.py", ("tests/methods/test_linear_layers.py::test_it_is_its_equation_forward_and_backward", "tests/methods/test_linear_layers.py::test_a_profile_chooses_the_layers", "tests/finetune/test_student.py::test_sla_learns_over_a_window_and_in_another_order")),
    Paper("SLA", "works", "critical blocks exact, the others by learned linear attention", "dit_accel/methods/sla.py", ("tests/methods/test_sla.py::test_the_projected_form_is_the_paper", _LINEAR + "test_backward")),
    Paper("TransNormerLLM", "works", "its norm in place of the divisor, `rms`; a direction in time and training from scratch have no form; trained for 200 steps, level in clips with the plain branch", _BRANCH + "rms.py", (_BRANCHES + "test_rms_is_the_plain_branch_over_its_root_mean_square",)),
    Paper("TFLA", "works", "two levels of tiles: programs over spans of keys whose states are summed; its mLSTM with a sigmoid gate is `gated & rms`, by the same kernels, without the gate of time; trained for 200 steps, level in clips with the plain branch", "kernels/sparse_linear_attention/states.py", (_LINEAR + "test_parts_of_the_heads_give_the_same_bits", _BRANCHES + "test_the_kernels_run_where_they_can_be_told_of_the_weights", _EQUATION)),
    Paper("Long-Context Attention Benchmark", "works", "pattern × length × ranks in one table, `dit-accel bench --pattern … --length … --ranks …`: tables of one share and different shape, the share of one rank cut out and run alone; no ratio without a check", "dit_accel/bench/axes.py", ("tests/test_axes.py::test_every_pattern_keeps_the_same_share", "tests/test_axes.py::test_the_shares_of_all_ranks_are_the_whole", "tests/test_axes.py::test_no_ratio_for_a_wrong_result")),
    Paper("Gated Linear Attention", "works", "a gate for each key in the linear branch, from the key: `gated`; its decay over time has no form, that over distance is `decay`; `gated`, trained for 200 steps, level in clips with the plain branch", _BRANCH + "gated.py", (_EQUATION, _LEARNS)),
    Paper("Superlinear Attention", "works", "spans first, by a router that is trained, blocks inside of them: `learned(span=4)`, and `regions` without training; of its search in several steps there is one", _ROUTER, (_ROUTES + "test_blocks_come_from_the_best_spans", _SCORED + "test_blocks_come_from_the_best_regions")),
    Paper("LeanAttention", "none", "unequal work split evenly: rows taken longest first were built and measured, gained nothing on an H200, and are out (kernels/block_table/README.md)"),
    Paper("Sequence Parallelism (ring)", "works", "keys and values go round in parts, whose outputs are merged by their log-sum-exp: `share(pipe, kv=\"ring\")`, `--kv ring`", "dit_accel/parallel/sharded.py", (_RING, "tests/test_ring.py::test_parts_are_merged_by_their_log_sum_exp")),
    Paper("LASP-2", "works", "one all-reduce of linear states, one gather of keys and values, where heads do not divide: `share(pipe, kv=\"gather\")`, `--kv gather`", "dit_accel/parallel/sharded.py", (_RING,)),
    Paper("Local Linear Attention", "works", "softmax fits values by a local constant, this by a local line: the first-order term of the pooled tail, `Pooled(tail=\"line\")`, one matrix for a block of queries; in plain torch, 4 to 12 times slower than means on an H200, so no default", "kernels/pooled_attention/line.py", (_POOLED + "test_half_the_spread_is_half_the_error_of_means_and_a_quarter_of_that_of_lines", _POOLED + "test_the_line_is_its_equation", _POOLED + "test_the_gradient_of_the_line")),
    Paper("TransMLA", "none", "converts grouped heads into a latent KV cache"),
    Paper("X-EcoMLA", "none", "distils attention into a latent KV cache"),
    Paper("SEA", "works", "a learned estimate of the attention of blocks, distilled from the exact one, whose best are read: `learned`, low-rank instead of a linear attention and a decoder; in an SLA, trained for 200 steps, level in clips with `sub`", _ROUTER, (_ROUTES + "test_scores_and_loss_are_their_equations", _ROUTES + "test_it_learns_what_means_do_not_see", "tests/finetune/test_student.py::test_a_selector_learns_beside_the_model")),
    Paper("FlashAttention-4", "works", "rescale only where a maximum grew by more than 2⁸: a constant of the plain forward kernel, which no launch uses, for on an H200 it is 17 to 26 % slower; its own kernel is a dense and a block-sparse control of `bench`; polynomial exponentials and its pipeline are for Blackwell, whose exponentials are the slower unit: on Hopper those of a tile of 128 × 128 × 128 take 1,024 cycles of an SM, its products 1,970 (arithmetic)", "kernels/tiles.py", ("tests/kernels/test_triton_block_sparse_attention.py::test_lazy_rescaling_stays_within_rounding", "tests/kernels/test_triton_block_sparse_attention.py::test_lazy_rescaling_is_off_and_keeps_an_earlier_maximum", "tests/test_rivals.py::test_ratios_refer_to_the_fastest_dense")),
    Paper("Trainable Dynamic Mask", "works", "importance of keys by their values: c·v̄ of `learned`, trained, and `valued` without training; the mask is 0 or −∞ and has no gradient, its distillation has", _ROUTER, (_ROUTES + "test_scores_and_loss_are_their_equations", _SCORED + "test_values_of_one_size_leave_the_choice_to_the_means")),
    Paper("TransPrune", "works", "prunes tokens by how they change and by attention on text", "dit_accel/pruning/criteria.py", ("tests/test_prune.py::test_ttv_is_its_formula_and_finite_in_half_precision", "tests/test_prune_parts.py::test_share_of_attention_on_text_is_exact_for_blocks_of_one")),
    Paper("Sparsifiner", "works", "a learned low-rank connectivity of blocks: `learned`; a basis over the places of tokens does not fit clips of any size, so that it is one over channels", _ROUTER, (_ROUTES + "test_scores_and_loss_are_their_equations", _ROUTES + "test_untrained_it_is_means_table_for_table")),
    Paper("Combiner", "works", "summaries and keys in one softmax: pooled", "dit_accel/methods/pooled.py", (_POOLED + "test_pooled_is_its_equation", _POOLED + "test_pooled_backward")),
    Paper("HiP", "works", "tree search of the best blocks: a control, for scoring all of them costs a 16,384th of dense at 256k tokens", _REGIONS, (_SCORED + "test_a_tree_finds_the_best_where_scores_have_one_peak", _SCORED + "test_a_tree_misses_what_hides_beside_a_bad_middle")),
    Paper("EasySpec", "none", "speculation needs a draft and a lossless check"),
    Paper("RCMHA", "works", "a depth-wise convolution beside attention, trained: `conv`; its relative positions are the model's own; trained for 200 steps, level in clips with SLA's plain branch", _BRANCH + "conv.py", (_BRANCHES + "test_a_kernel_that_is_one_at_its_middle_adds_the_values", _LEARNS)),
    Paper("2D-TPE", "works", "each head reads the grid in its own order, time, tiles or Hilbert, chosen by a profile instead of learned", "dit_accel/methods/sorts.py", (_SORTS + "test_each_head_is_as_if_all_had_its_order", _SORTS + "test_one_order_for_all_heads_is_that_of_the_model")),
    Paper("FIT", "works", "exact in a window, learned latents that read a block each for all that is outside: `SLA(branch=\"latents\", linear=\"rest\")` over a window; latents do not live on from layer to layer; beside `sub`, trained for 200 steps, level in clips with the plain branch", _BRANCH + "latents.py", ("tests/methods/test_memories.py::test_latents_read_blocks_and_are_read", "tests/methods/test_memories.py::test_a_latent_that_asks_for_nothing_is_the_mean_of_its_block", _WINDOWS + "test_pooled_over_a_window_is_near_tokens_and_the_means_of_the_others")),
    Paper("MoA", "works", "a budget for each head under a total, from one profile", "dit_accel/methods/budget.py", (_PROFILE + "test_the_choice_is_that_of_brute_force", _PROFILE + "test_a_budget_of_heads_runs_and_keeps_its_total", "tests/kernels/test_part_scores.py::test_a_share_for_each_head")),
    Paper("TCA", "works", "budgets of heads by captured mass, from one calibration: `--heads profile.json@mass0.9`, beside those by error", "dit_accel/methods/budget.py", (_PROFILE + "test_the_mass_of_heads_and_the_least_keep_that_holds_one", _PROFILE + "test_mass_is_the_exact_share_of_the_chosen_blocks")),
    Paper("DeltaLLM", "works", "keys that change little in time share a block, whose mean stands for them: pooled in the order of time; what changes little over steps is a residual", "dit_accel/methods/sorts.py", (_SORTS + "test_keys_that_stay_in_time_lose_nothing", "tests/methods/test_shared.py::test_at_the_caching_step_the_partial_formula_is_the_dense_output")),
    Paper("S2-Attention", "works", "a strided shard for each head, which together are everything: a static control", _STATIC, (_STATICS + "test_the_shards_of_all_heads_are_everything",)),
    Paper("RALA", "works", "keys weighed by the mean query, and a gate of the output from the attention's input: `rala`; trained for 200 steps, level in clips with the plain branch", _BRANCH + "rala.py", (_EQUATION, _BRANCHES + "test_rala_reads_what_the_attention_is_given", _LEARNS)),
    Paper("Rectified SpaAttn", "works", "sparse attention rescaled to its mass, plus pooled values", "dit_accel/methods/rectified.py", (_POOLED + "test_rectified_is_its_equation", "tests/methods/test_selectors.py::test_the_critical_set_is_the_equations")),
    Paper("Routing Transformer", "works", "k-means of each head's queries and keys as the order of its tokens, which blocks of one size cut", "dit_accel/methods/sorts.py", (_SORTS + "test_tokens_of_a_cluster_lie_together", _SORTS + "test_clusters_find_what_is_scattered")),
    Paper("DHSA", "works", "chunks by content, whose means times √length score the blocks; borders where tokens are least alike instead of learned ones", "dit_accel/methods/selectors/chunks.py", (_SCORED + "test_chunks_that_are_blocks_are_the_means", _SCORED + "test_chunks_end_where_tokens_change")),
    Paper("Kronecker attention", "none", "correlations of three: another function, cubic work"),
    Paper("DCAL", "none", "distractor pairs in the training of recognition"),
    Paper("MInference", "works", "columns and diagonals of a sample of the attention, and a pattern for each head, chosen offline: slash and per-head, controls, whose tables take longer than the sparse attention that reads them on an H200", "dit_accel/methods/selectors/slash.py", (_SCORED + "test_a_key_that_all_queries_like_is_a_column", _SCORED + "test_scores_of_a_distance_are_a_diagonal", "tests/methods/test_per_head.py::test_each_head_has_its_selectors_rows")),
    Paper("EchoAtt", "works", "layers that read the tables of others: `reuse=\"layers:0,4,8\"`, those of a profile; a control", "dit_accel/methods/reuse.py", (_REUSE + "test_layers_read_what_their_leader_reads", _REUSE + "test_a_pipeline_shares_tables_between_layers")),
    Paper("BiFormer", "works", "coarse scores of regions, finer ones inside: block means, and means of their parts", _SUB, (_PARTS + "test_the_same_choice", _PARTS + "test_parts_of_one_token_give_the_attention_of_blocks", "tests/test_choice.py::test_more_parts_come_nearer_to_the_exact_shares")),
    Paper("Re-ttention", "works", "a window, rescaled and completed by an earlier full step", "dit_accel/methods/rettention.py", ("tests/methods/test_rettention.py::test_at_the_caching_step_the_sparse_formula_is_the_dense_output",)),
    Paper("NOSA", "none", "offloads a KV cache of decoding; how many blocks are chosen again is a column of `profile`"),
    Paper("FlashAttention-2", "works", "the dense control of every table", "dit_accel/bench/baselines.py", ("tests/test_bench.py::test_a_row_has_times_ratio_and_error",)),
    Paper("AllMem", "works", "a window and a memory that trains while it runs: the branch `memory` over a window, a linear map that descends its loss over all keys in each call; beside `sub`, trained for 200 steps, level in clips with the plain branch", _BRANCH + "memory.py", ("tests/methods/test_memories.py::test_a_memory_descends_the_gradient_of_its_loss", "tests/methods/test_memories.py::test_one_step_is_linear_attention_without_a_divisor", "tests/finetune/test_student.py::test_sla_learns_over_a_window_and_in_another_order")),
    Paper("FcaFormer", "none", "more keys from earlier blocks, trained from scratch"),
    Paper("Faster Neighborhood Attention", "works", "windows by axis with dilation, for every method, in whole blocks of the fused kernel; with the order tile these are tiles of the picture", "dit_accel/methods/selectors/window.py", (_WINDOWS + "test_a_window_is_the_blocks_that_its_tokens_touch", _WINDOWS + "test_every_token_has_as_many_neighbours")),
    Paper("SALE", "works", "an estimate of all pairs in four bits against a threshold relative to what is near: `relative(4.8,parts=64,bits=4)`; shows what it finds, no kernel makes it fast", _RELATIVE, (_SCORED + "test_an_estimate_in_few_bits", _SCORED + "test_what_is_above_the_threshold_is_kept_up_to_the_cap")),
    Paper("AnchorAttention", "works", "a threshold relative to the blocks that are read anyway, with a cap; blocks instead of stripes of tokens", _RELATIVE, (_SCORED + "test_a_threshold_of_nothing_or_everything", _SCORED + "test_what_is_above_the_threshold_is_kept_up_to_the_cap")),
    Paper("MASA", "none", "fewer parameters, the same time"),
    Paper("SLAB", "works", "ReLU features of the linear branch, and a depth-wise convolution of the values beside it: `conv`; its batch norm has nothing to fold into; `conv`, trained for 200 steps, level in clips with the plain branch", _BRANCH + "conv.py", (_LINEAR + "test_feature_maps", _EQUATION)),
    Paper("MaxViT", "works", "own window and a dilated grid, which reach everything in two layers: a static control", _STATIC, (_STATICS + "test_a_window_and_a_grid_reach_everything_in_two_layers",)),
    Paper("TAPPA", "works", "a table serves as long as its queries stay alike: `reuse=\"8+drift0.9\"`", "dit_accel/methods/reuse.py", (_REUSE + "test_a_table_serves_while_queries_stay_alike", _REUSE + "test_a_table_serves_so_many_steps")),
    Paper("HyLRA", "works", "sensitive layers dense, the others read the tables of leaders that a profile's overlaps choose by a dynamic programme, over steps too", "dit_accel/methods/budget.py", (_PROFILE + "test_leaders_are_those_of_brute_force", _REUSE + "test_layers_read_what_their_leader_reads", "tests/test_tune.py::test_sensitivity_is_the_error_of_each_layer")),
    Paper("Unified View of long-sequence models", "works", "one template, heads over devices", "dit_accel/parallel/ulysses.py", (_ULYSSES,)),
    Paper("PowerAttention", "works", "blocks at distances of powers of two, which reach everything in log₂ M layers: a static control", _STATIC, (_STATICS + "test_powers_of_two_reach_everything_in_log_layers",)),
    Paper("MVAR", "works", "its rule of space is a window of one frame, `window(t=1,h=8,w=8)`; next-scale autoregression has no form", "dit_accel/methods/selectors/window.py", (_WINDOWS + "test_a_window_is_the_blocks_that_its_tokens_touch",)),
    Paper("Token Reduction Should Go Beyond Efficiency", "works", "a position, whose demand has a form: what pruning does to quality is measured beside its speed", "dit_accel/pruning/config.py", ("tests/test_prune.py::test_every_criterion_runs_close_to_dense",)),
)  # fmt: skip


def page() -> str:
    """The page, whole."""
    counts = {state: sum(paper.state == state for paper in PAPERS) for state in STATES}
    lines = [
        "# The reading list, paper by paper",
        "",
        "Written by `python tests/papers.py`; a test holds each row to the tests that it names.",
        "",
        f"**works** ({counts['works']}): what has a form here is in code, and tested; each row says what has "
        f"none. **open** ({counts['open']}): it",
        f"has a form here that is not built. **none** ({counts['none']}): it has no form in a frozen "
        "bidirectional transformer.",
        "",
        "| paper | state | idea, and its form here | where | tests |",
        "|---|---|---|---|---|",
    ]
    for paper in PAPERS:
        where = f"[`{Path(paper.file).name}`](../../{paper.file})" if paper.file else ""
        tests = "<br>".join(f"`{test.split('::')[1]}`" for test in paper.tests)
        lines.append(f"| {paper.name} | {paper.state} | {paper.form} | {where} | {tests} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
