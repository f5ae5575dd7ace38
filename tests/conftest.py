"""Settings that all tests share: hypothesis profiles, threads, seed."""

import gc
import logging
import os
import zlib

import pytest
import torch
import torch._dynamo.guards
from hypothesis import HealthCheck, Phase, settings

from mnet_fx.arithmetic import fingerprints

common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", max_examples=40, **common)
settings.register_profile("deep", max_examples=1000, **common)
settings.register_profile("mutants", max_examples=40, phases=[Phase.explicit, Phase.generate], **common)  # nobody reads the example
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0  # takes 20 ms per capture to flush caches and time guards, for a log
gc.set_threshold(50_000, 20, 20)  # a whole collection takes a second where Dynamo has left a million objects


DEVICE = os.environ.get("MNET_FX_DEVICE")  # such as cuda: where tests make their tensors; the processor, if not set


class _Generator(torch.Generator):
    """One on the device of the tests, where none is named: generators take no notice of the default device."""

    def __new__(cls, device=DEVICE):
        return super().__new__(cls, device)


@pytest.fixture(autouse=True)
def _untraced():
    """pytest 9 listens to loggers that do not propagate, so that all of torch.compile's traces would be written, and kept."""
    trace = logging.getLogger("torch.__trace")
    trace.propagate = True
    trace.handlers.clear()


@pytest.fixture(autouse=True)
def _repeatable(request, monkeypatch):
    torch.set_num_threads(1)  # on a busy machine, two threads make small operations a hundred times slower
    if DEVICE is not None:
        in_c = request.path.stem in ("test_fused", "test_native") or "[c-" in request.node.name  # loops for the processor
        torch.set_default_device("cpu" if in_c else DEVICE)
        if not in_c:
            monkeypatch.setattr(torch, "Generator", _Generator)
    torch.manual_seed(0)


@pytest.fixture(autouse=os.environ.get("MNET_FX_LATER") == "1")
def _later(monkeypatch):
    """As on a device, fingerprints are compared when a backward pass ends; for a run of the whole suite that way, on a CPU."""
    monkeypatch.setattr(fingerprints, "ON_HOST", set())


QUICK = [
    "architecture",
    "mutants",
    "rules",
    "matching",
    "nesting",
    "hoisting",
    "leftovers",
    "effects",
    "fills",
    "fixed_point",
    "dtypes",
    "fingerprints",
    "native",
    "cost",
    "tape",
    "replay",
    "surroundings",
    "attributes",
    "streams",
    "graph",
]


SLOW = (  # single cases of tests that are else run always: what they show, others show too
    "test_training_leaves_no_more_objects_than_checkpoints_do_and_does_not_grow[spilling]",
    "test_training_leaves_no_more_objects_than_checkpoints_do_and_does_not_grow[compiled inside]",
    "test_training_leaves_no_more_objects_than_checkpoints_do_and_does_not_grow[torch.compile]",
    "test_a_pickle_runs_in_another_process[resnet]",
    "test_a_pickle_runs_in_another_process[function]",
    "test_sizes_that_depend_on_values[inductor-Routes-3]",
    "test_two_thousand_steps",
    "test_an_example_runs[ddp]",
    "test_a_fresh_process_tells_its_resident_size",
    "test_a_process_that_ends_or_takes_long_costs_one_way",
    "test_the_trainer_of_hugging_face[gradient_checkpointing]",
    "test_a_region_within_it_keeps_it_inside",
    "test_families[resnet101]",
    "test_models[opt--]",
    "test_reversible_gradients_and_buffers_are_those_of_stored[swin_t]",
    "test_every_chain_is_rewritten_and_reversible_is_stored[bert]",
    "test_every_chain_is_rewritten_and_reversible_is_stored[gpt2]",
    "test_other_shapes_and_modes_are_compiled_again[True]",
    "test_blocks_in_three_layouts_are_one_chain[aot_eager]",
    "test_finds_every_residual_add[swin_t]",
    "test_gamma_zero_gives_the_logits_of_the_original[swin_t]",
    "test_the_given_model_is_left_as_it_was[swin_t]",
    "test_bits_are_those_of_the_state_on_the_cpu[groups1]",
    "test_no_fake_tensor_keeps_its_history[aot_eager]",
    "test_kept_and_peak_bytes_of_an_encoder_do_not_grow_with_depth[0.1]",
)


LONG = (  # likewise, but `.ci/run` runs them: the largest of what other tests show of something smaller
    "test_bits_are_those_of_the_state_on_the_cpu[float32,bfloat16,float16,float64]",
    "test_a_chain_that_the_garbage_collector_finds_while_a_mailbox_is_taken",
    "test_training_leaves_no_more_objects_than_checkpoints_do_and_does_not_grow[captured]",
    "test_the_callback_in_the_trainer_of_hugging_face[bert]",
    "test_all_but_the_compilers_run_on_tiny_models",
    "test_programs[rest]",
    "test_programs[eager]",
    "test_programs[graph]",
    "test_convolutions_within_three_percent",
    "test_the_optimizer_counts",
    "test_momentumize_plans_by_itself",
    "test_it_is_the_network_of_momentumize[bert]",
    "test_gamma_zero_is_the_inner_compiler_alone[bert]",
    "test_the_cheapest_that_is_faithful_and_the_most_faithful_that_fits",
    "test_small_gammas_cost_bytes_where_chains_are_long",
    "test_an_example_runs[nested_rings]",
    "test_an_example_runs[dynamics_1d]",
    "test_an_example_runs[transformer_memory]",
    "test_memory_grows_by_what_is_kept_and_no_more[eager]",
    "test_other_shapes_and_modes_are_compiled_again[None]",
    "test_the_callback_in_the_trainer_of_hugging_face[gpt2]",
    "test_the_torchrun_example_of_the_documentation",
    "test_every_chain_is_rewritten_and_reversible_is_stored[vit_b_16]",
    "test_gamma_zero_is_the_inner_compiler_alone[vit_b_16]",
    "test_it_is_the_network_of_momentumize[vit_b_16]",
    "test_it_keeps_less",
    "test_bits_are_those_of_the_state_on_the_cpu[drawn]",
    "test_blocks_run[docs/tutorial-fine-tune.md]",
    "test_blocks_run[docs/tutorial.md]",
    "test_blocks_run[docs/timm.md]",
    "test_blocks_run[docs/will-it-fit.md]",
    "test_blocks_run[docs/torch-compile.md]",
    "test_blocks_run[docs/decide.md]",
    "test_every_way_of_a_tiny_work_is_measured_and_right",
    "test_blocks_run[docs/fine-tuning.md]",
    "test_blocks_run[docs/training-stacks.md]",
    "test_sizes_that_depend_on_values[inductor-RoutesOnce-2]",
    "test_encoder_and_decoder_with_the_gradients_of_the_memory[{'norm_first': True}]",
    "test_bfloat16_and_sizes_that_vary",
    "test_each_oracle_sees_what_is_wrong[another_recurrence-not the recurrence]",
    "test_tables_show_what_was_measured",
    "test_the_picture_has_a_field_for_each_work",
    "test_the_largest_batch_lies_on_the_line_through_two",
    "test_a_gradient_that_is_off_by_a_hundredth_is_wrong",
    "test_a_way_that_cannot_be_built_has_a_row_that_says_why",
    "test_lightning_finds_the_batch_size_by_an_estimate[captured]",
    "test_models[swin--]",
    "test_the_estimate_and_a_plan_know",
    "test_a_pickle_runs_in_another_process[exported]",
    "test_training_leaves_no_more_objects_than_checkpoints_do_and_does_not_grow[named]",
    "test_the_depth_factor_is_that_of_a_deeper_net",
    "test_of_a_captured_encoder[0.1]",
    "test_all_is_as_with_stored_activations[eager-0.05]",
    "test_lightning_finds_the_batch_size_by_an_estimate[layers]",
    "test_a_build_of_torch_without_cuda",
    "test_sizes_that_depend_on_values[inductor-Routes]",
    "test_where_nothing_is_finite_nothing_is_verified",
    "test_long_regions_are_drawn_short",
    "test_matplotlib_is_needed_only_for_pictures",
    "test_the_batch_size_finder_of_lightning_changes_nothing_else",
    "test_sizes_that_vary",
    "test_a_graph_module_and_what_cannot_be_tried",
    "test_the_model_stays_and_one_call_calibrates_nothing",
    "test_it_is_torchs_own[afterwards]",
    "test_blocks_in_three_layouts_are_one_chain[eager]",
    "test_sizes_that_depend_on_values[inductor-RoutesOnce]",
    "test_one_row_behind_the_chain_broadcasts[gather-inductor-broken before]",
    "test_works_as_the_first_call[estimate]",
    "test_inductor_train_and_eval_with_dropout",
)


NEWER = (  # torch 2.14 is the first that can: Dynamo's own view of such programs, and rooflines
    "test_a_hook_on_the_input_of_a_step_is_refused",
    "test_noise_that_python_tells_repeats[spill-python]",
    "test_models[Python's generator]",
    "test_weird_model[custom gradient]",
    "test_weird_model[custom gradient in the root]",
    "test_weird_model[custom gradient in the root, captured at once]",
    "test_a_hook_sees_the_whole_gradient_of_its_tensor",
    "test_chains_three_deep",
    "test_what_is_compiled_does_not_grow_with_depth",
    "test_the_steps_of_an_inner_chain_run_twice",
    "test_programs[captured]",
    "test_each_oracle_sees_what_is_wrong[other_momentum-gamma=0 is not]",
    "test_each_oracle_sees_what_is_wrong[other_stored-reversible is not]",
    "test_seconds_of_a_gpu",
    "test_errors_name_the_argument[arguments2-gpu must be one that torch has a data sheet of]",
    "test_an_error_names_the_argument_and_the_cause[estimate own_model.py:Net --input 4x16 --gpu NVIDIA H1000---gpu: ]",
    "test_a_float_that_is_read_from_a_tensor",
    "test_what_a_model_logs_cuts_no_chain_and_is_heard",
    "test_what_a_library_adds_to_loggers",
    "test_dynamo_is_left_as_it_was",
)


THINNED = {  # cross products of which one case in so many is run as often as it would be, and the others more rarely
    "test_other_sizes_are_the_same_network": 4,
    "test_the_original_at_gamma_zero_and_exact": 3,
    "test_all_kinds_of_call_are_one_network": 3,
    "test_the_order_is_the_models_own": 3,
    "test_writes_by_other_names": 4,
    "test_the_next_call_is_the_momentum_network_again": 3,
    "test_ways_to_change_a_layout": 3,
    "test_every_kind_of_block": 3,
    "test_a_filled_branch_is_found_and_right": 3,
    "test_gradients_are_those_of_stored_activations": 2,
    "test_side_outputs_are_those_of_the_model": 3,
    "test_what_is_kept_outside_does_not_grow_with_depth": 3,
    "test_each_kind_between_two_others": 2,
    "test_gradients_agree_with_finite_differences": 4,
    "test_second_gradients_are_those_of_the_recurrence": 3,
    "test_two_processes": 3,
    "test_gradients_are_those_of_the_original": 3,
    "test_models_of_every_floating_dtype": 3,
    "test_ours_is_right_in_every_situation": 2,
    "test_pure_steps_and_others": 2,
    "test_hooks_that_come_later": 3,
    "test_whatever_is_kept_nothing_else_changes": 3,
    "test_it_counts_the_residual_adds_of_a_zoo": 2,
    "test_a_model_with_a_cache_is_rewritten_and_the_cache_left_as_it_was": 3,
    "test_the_loss_and_its_gradients": 2,
    "test_masks_are_applied": 2,
    "test_copies_work_on_their_own": 3,
    "test_copies_pickles_and_dtypes_have_the_maps": 2,
    "test_a_step_that_differentiates_within_itself": 3,
    "test_an_inner_compiler_leaves_recurrent_layers_as_they_are": 3,
    "test_dropout_between_the_layers_of_a_recurrent_step_is_drawn_again": 2,
    "test_what_is_not_run_is_noted_to_do_what_running_it_shows": 2,
    "test_random_programs": 2,
    "test_same_bits_as_the_eager_loops": 2,
    "test_links_with_side_inputs": 2,
    "test_options_of_checkpointing_are_refused": 3,
    "test_an_encoder_of_six_layers_is_one_chain_of_twelve": 2,
    "test_the_same_object_computes_what_a_copy_would_and_then_the_original": 2,
    "test_noise_is_as_in_the_original_going_forward": 2,
    "test_channels_last": 2,
    "test_checkpoint_around_the_net": 2,
    "test_gamma_zero_is_the_original": 3,
    "test_reversible_is_stored_bit_for_bit": 3,
    "test_reversible_is_stored": 3,
    "test_state_comes_back_and_bits_stay_at_the_floor_for_every_gamma_and_depth": 3,
    "test_a_write_to_shared_memory_keeps_its_place": 3,
    "test_a_net_that_is_dropped_is_freed": 3,
    "test_copies_pickles_and_state_dicts": 3,
    "test_layers_may_change_after_a_call": 3,
    "test_every_add_is_there_once": 3,
    "test_checkpoints_carry_the_maps": 3,
    "test_exported_programs_are_plain_graphs_that_give_the_same": 3,
    "test_gamma_zero_is_the_inner_backend_alone": 3,
    "test_nan_or_inf_in_any_activation_comes_out": 3,
    "test_copies_are_independent_and_whole": 3,
    "test_what_leads_nowhere_gives_no_gradients": 3,
    "test_values_and_gradients_are_as_accurate_as_the_float32_recurrence": 3,
    "test_first_gradients_are_those_of_the_recurrence": 3,
    "test_a_parameter_changed_behind_a_zero_scale_raises": 3,
    "test_gradients_of_dropout_by_finite_differences": 3,
    "test_writes_under_no_grad_keep_their_place_and_the_chain": 3,
    "test_the_options_make_the_network_that_was_measured": 3,
    "test_closer_to_the_original_and_exact": 3,
    "test_optimizers": 3,
    "test_a_stream_that_escapes_may_be_overwritten": 3,
    "test_a_net_is_rebuilt_as_it_was": 3,
}


def _places(items):
    """For each case of a test in THINNED its place among so many: drawn by its name, so that no value of any parameter is left out by a
    pattern; 0 for the first case where none else has it.
    """
    found = {}
    for item in items:
        if (every := THINNED.get(getattr(item, "originalname", None))) is not None:
            found.setdefault((item.path, item.cls, item.originalname), {})[item.nodeid] = zlib.crc32(item.name.encode()) % every
    for places in found.values():
        if 0 not in places.values():
            places[next(iter(places))] = 0
    return {name: place for places in found.values() for name, place in places.items()}


def _thinned(item, marker, place):
    """The marker of a case: of every three, say, one is run as it would be; of the others every third is `long`, and the rest `slow`."""
    if marker == "slow" or place == 0:
        return marker
    item.own_markers = [mark for mark in item.own_markers if mark.name != "long"]
    return "long" if marker is None and _drawn(item) else "slow"


def _drawn(item):
    """Every third case, by its name."""
    return zlib.crc32(f"{item.name} long".encode()) % 3 == 0


def _marker(item):
    """How long a test takes for what it shows beside others; None: run always."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    everyday = item.path.stem == "test_everyday"  # the form that spills does what the other two do
    if item.name in SLOW or (everyday and ("reverse" in values or ("inputs" in values and zlib.crc32(item.name.encode()) % 3))):
        return "slow"
    if item.path.stem == "test_families" and "efficientnet_b0" in {getattr(v, "name", v) for v in values}:
        return "slow"
    families = item.path.stem == "test_families" and "swin_t" in {getattr(v, "name", v) for v in values}
    others = any(isinstance(v, str) and v == "aot_eager" for v in values)
    others |= everyday and ("inputs" in values or zlib.crc32(item.name.encode()) % 3 == 1)
    if item.name in LONG or families:
        return "long"
    return ("long" if _drawn(item) else "slow") if others else None


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """After each file, leaves what has come to stay out of further collections of garbage."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """The tests of one thing at a time are marked quick; see CONTRIBUTING.md."""
    places = _places(items)
    for item in items:
        given = next((name for name in ("slow", "long") if item.get_closest_marker(name)), None)
        if (marker := _thinned(item, given or _marker(item), places.get(item.nodeid, 0))) is not None:
            item.add_marker(getattr(pytest.mark, marker))
        if item.name in NEWER and torch.__version__ < "2.14":
            item.add_marker(pytest.mark.skip(reason="torch 2.14 is the first that can"))
        if item.path.stem.removeprefix("test_") in QUICK and not (item.get_closest_marker("slow") or item.get_closest_marker("long")):
            item.add_marker(pytest.mark.quick)
    if part := os.environ.get("MNET_FX_PART"):
        number, parts = map(int, part.split("/"))
        left = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts != number % parts]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]
