"""What `pytest -m quick` leaves out: a look at every area while one works, in under three minutes.

Left out are tests that take long on a CPU: those that compile many graphs, start many processes or
build, and drawn ones with many examples. All else without a GPU is quick, new tests too.
"""

import re

# By area and file: names of tests, with their parameters where they are to count, as regular
# expressions; none for the whole file.
SLOW = {
    "benchmarks/test_benchmark_scaling.py": (),
    "benchmarks/test_benchmarks.py": (
        "test_bad_arguments_are_named",
        "test_cpu_run_end_to_end",
        "test_pages_of_the_repository_are_current",
    ),
    "benchmarks/test_builder_bytes.py": (),
    "benchmarks/test_docs_code.py": ("test_usage_models",),
    "cli/test_cli.py": ("test_missing_package", "test_demo_as_a_command", "test_info_as_a_command"),
    "cli/test_simulate_command.py": ("test_missing_package", "test_as_a_command"),
    "cost/test_simulate.py": ("test_extension_of_another_python",),
    "distributed/test_distributed.py": (
        r"test_case\[.*-[48]\]",
        r"test_case\[.*compiled.*\]",
        "test_example",
        "test_is_imported_only_when_asked_for",
    ),
    "host/test_list_stages.py": ("test_every_pair_is_met_once",),
    "host/test_sm100.py": (),
    "host/test_stripe_stages.py": ("test_every_visible_pair_is_met_once",),
    "host/test_walks.py": ("test_neighborhood",),
    "integrations/test_diffusers.py": ("test_first_dense_steps_are_the_original",),
    "integrations/test_diffusers_benchmark.py": (),
    "integrations/test_diffusers_compiled.py": (),
    "integrations/test_diffusers_errors.py": ("test_the_package_does_not_import_diffusers",),
    "integrations/test_diffusers_beside.py": ("test_an_enabled_model_counts_steps_when_compiled",),
    "integrations/test_diffusers_copies.py": (
        "test_hooks_after_loading_do_not_take_the_place_of_ours",
        "test_a_model_with_the_backend_by_name_is_loaded_in_another_process",
    ),
    "integrations/test_diffusers_layers.py": ("test_a_graph_for_each_method",),
    "integrations/test_diffusers_memory.py": (
        "test_attention_needs_a_few_times_its_output",
        "test_no_preset_needs_more_than_the_dense_model",
    ),
    "integrations/test_diffusers_models_benchmark.py": (),
    "integrations/test_diffusers_parallel.py": (),
    "integrations/test_diffusers_runs.py": (),
    "integrations/test_diffusers_runs_drawn.py": (),
    "integrations/test_hub.py": (),
    "integrations/test_options_without_effect.py": ("test_reports_do_not_change_what_is_compiled",),
    "integrations/test_transformers.py": ("test_compiled",),
    "masks/test_block_mask.py": ("test_plotting_alone_needs_matplotlib", "test_union"),
    "masks/test_block_mask_flex.py": ("test_to_flex_is_the_same_attention",),
    "masks/test_masks_traced.py": (
        "test_checkpoint",
        "test_one_graph_serves_masks_of_all_lengths",
        "test_one_graph_serves_masks_of_the_same_shapes",
        "test_an_exported_program_is_saved_and_takes_other_masks",
    ),
    "masks/test_masks_follow.py": ("test_a_copy_is_the_same",),
    "ops/test_decode_product.py": (),
    "ops/test_cpu_isa.py": ("test_drawn", "test_every_mechanism"),
    "ops/test_compile.py": ("test_one_graph_serves_all_grids",),
    "ops/test_backward.py": (
        "test_gradcheck",
        "test_fp64",
        "test_errors_are_at_most_twice_those_of_torch",
    ),
    "ops/test_backward_torch.py": ("test_opcheck", "test_compiled_.*"),
    "ops/test_decode_torch.py": ("test_compiled", "test_one_graph_.*", "test_opcheck"),
    "ops/test_derivatives.py": (
        "test_compiled",
        "test_first_derivatives_are_right",
        "test_what_is_lacking_raises",
    ),
    "ops/test_derivatives_functions.py": ("test_merge",),
    "ops/test_errors_library.py": (),
    "ops/test_register_derivatives.py": ("test_compiled",),
    "ops/test_sdpa_drawn.py": (),
    "ops/test_stripe.py": ("test_mask", "test_opcheck_and_compile"),
    "ops/test_symbolic.py": (),
    "ops/test_torch.py": ("test_compile", "test_opcheck_.*"),
    "ops/test_typing.py": (),
    "ops/test_varlen_torch.py": ("test_opcheck", "test_.*compiled", "test_one_graph_.*"),
    "packaging/test_bootstrap.py": ("test_unreachable_package_index",),
    "packaging/test_configure.py": (),
    "packaging/test_dependencies.py": (),
    "packaging/test_ptxas.py": ("test_a_real_spill_is_seen",),
    "packaging/test_sdist.py": (),
    "packaging/test_wheel.py": (),
    "patterns/test_anchor_ops.py": ("test_means", "test_opcheck"),
    "patterns/test_patterns_capture.py": ("test_it_can_be_traced_in_one_graph",),
    "patterns/test_patterns_vertical_slash.py": ("test_it_can_be_traced_in_one_graph",),
    "patterns/test_patterns_video.py": ("test_it_can_be_traced_in_one_graph",),
    "skipping/test_skipping.py": ("test_attention",),
    "skipping/test_skipping_ops.py": ("test_opcheck",),
}


def is_quick(item):
    """Whether a collected test is."""
    area, file = item.path.parts[-2:]
    if area == "gpu":
        return False
    slow = SLOW.get(f"{area}/{file}")
    if slow is None:
        return True
    names = {item.name, item.originalname}
    return slow != () and not any(re.fullmatch(s, name) for s in slow for name in names)
