"""Would the tests notice? Deliberate mistakes, one at a time, in a copy of the package.

    python tests/mutants.py              all of them (`make mutants`)
    python tests/mutants.py graph hook   those whose name or file holds one of these words

A mutant replaces one expression or statement of a function, found in its syntax tree: spaces, line breaks,
quotes and comments do not matter. The test that ought to catch it passes on the unchanged copy first; it is caught
if the test then fails. Exits with 1 if a mutant survives, or, with a message, if the check itself is stale: code
that is not there exactly once, a test that does not exist or does not pass. Takes about eight seconds a mutant.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("pdl_utils", "scripts", "tests", "pyproject.toml")

CAM, MEASURES = "grad_cam/test_grad_cam.py", "grad_cam/test_cam_metrics.py"
GRAPHS, GRAPH_MEASURES = "graphs/test_graph_attention.py", "graphs/test_graph_metrics.py"
LORA, TRANSFER, TRAINING = "few_labels/test_lora.py", "few_labels/test_transfer.py", "test_training.py"
FORMULA = f"{CAM}::test_maps_are_those_of_the_formula"
LOSS = "few_labels/test_simclr.py::test_the_loss"
PEFT = f"{LORA}::test_outputs_gradients_and_merged_weights_are_those_of_peft"
PYG = f"{GRAPHS}::test_equals_torch_geometric"
PROBE = f"{TRANSFER}::test_the_probe_is_scikit_learns_logistic_regression"
RESUMED = f"{TRAINING}::test_interrupted_and_resumed_equals_unbroken"
RECORDED = "test_notebook.py::test_results_are_kept_in_the_full_profile_only"


class Mutant(NamedTuple):
    """A mistake that somebody could make: in the function or class `where`, FILE::NAME, `old` becomes `new`.
    `test` ought to catch it: the name of a test, or how the names of several begin."""

    name: str
    where: str
    old: str
    new: str
    test: str


# fmt: off
MUTANTS = [
    # Grad-CAM, and the measures of its maps
    Mutant("Grad-CAM with the wrong sign", "grad_cam/maps.py::grad_cam",
           "m.relu()", "(-m).relu()", FORMULA),
    Mutant("only positive gradients weigh channels", "grad_cam/maps.py::grad_cam",
           "gradient.mean((3, 4))", "gradient.relu().mean((3, 4))", FORMULA),
    Mutant("guided ReLU lets the negative pass", "grad_cam/maps.py::GuidedReLU",
           "gradient.clamp(min=0)", "gradient.clamp(max=0)", f"{CAM}::test_guided_backprop_is_captums"),
    Mutant("maps enlarged with corners aligned", "grad_cam/maps.py::enlarge",
           "F.interpolate(maps, tuple(size), mode='bilinear', align_corners=False)",
           "F.interpolate(maps, tuple(size), mode='bilinear', align_corners=True)",
           f"{CAM}::test_enlarged_cells_cover_their_part_of_the_image"),
    Mutant("in-place ReLU overwrites what a hook kept", "grad_cam/hooks.py::record_activations",
           "seen[name].clone()", "seen[name]", f"{CAM}::test_recorded_activations_survive_in_place_operations"),
    Mutant("hooks stay on the model", "grad_cam/hooks.py::record_activations",
           "handle.remove()", "handle", f"{CAM}::test_the_model_is_left_as_it_was"),
    Mutant("explained in train mode", "grad_cam/hooks.py::evaluating",
           "model.eval()", "model", f"{CAM}::test_frozen_no_grad_inference_train_mode_and_channels_last_agree"),
    Mutant("the end of a box is outside", "grad_cam/metrics.py::box_masks",
           "x <= x1", "x < x1", f"{MEASURES}::test_both_ends_of_a_box_are_inside"),
    Mutant("class 0 is no class", "grad_cam/metrics.py::match_classes",
           "-1 if found.get(name) is None else found[name]", "found.get(name) or -1",
           f"{MEASURES}::test_labels_of_a_data_set_become_classes_of_a_network"),
    Mutant("deletion takes the least important first", "grad_cam/metrics.py::insertion_deletion",
           "maps.flatten(1).argsort(dim=1, descending=True, stable=True)", "maps.flatten(1).argsort(dim=1)",
           f"{MEASURES}::test_insertion_and_deletion_follow_the_order_of_the_map"),
    # Graphs
    Mutant("softmax subtracts the batch's maximum", "graphs/layers.py::edge_softmax",
           "scores - top.index_select(0, graph.target)", "scores - top.max()",
           f"{GRAPHS}::test_attention_rows_sum_to_one_beside_huge_scores"),
    Mutant("softmax over sources, not targets", "graphs/layers.py::edge_softmax",
           "weight / total.index_select(0, graph.target)", "weight / total.index_select(0, graph.source)", PYG),
    Mutant("GATv2 puts its vector before the LeakyReLU", "graphs/layers.py::pair_scores",
           "F.leaky_relu(pair, negative_slope) @ att", "F.leaky_relu(pair * att, negative_slope).sum(-1)", PYG),
    Mutant("GCN scales by the target's degree alone", "graphs/layers.py::GCNConv",
           "scale[graph.source] * scale[graph.target]", "scale[graph.target] * scale[graph.target]", PYG),
    Mutant("attention dropped in evaluation, too", "graphs/layers.py::AttentionConv",
           "F.dropout(attention, self.dropout, self.training)", "F.dropout(attention, self.dropout)",
           f"{GRAPHS}::test_attention_is_dropped_in_training_only"),
    Mutant("micro-F1 takes logits for probabilities", "graphs/metrics.py::micro_f1",
           "logits > 0", "logits > 0.5", f"{GRAPH_MEASURES}::test_micro_f1"),
    Mutant("Dirichlet energy relative to one channel's norm", "graphs/metrics.py::dirichlet_energy",
           "x.square().sum(dtype=torch.float64)", "x.square().mean(dtype=torch.float64)",
           f"{GRAPH_MEASURES}::test_dirichlet_energy"),
    Mutant("attention compared between neighbourhoods", "graphs/metrics.py::_ranks_within",
           "rankdata(group * len(distinct) + code)", "rankdata(code)",
           f"{GRAPH_MEASURES}::test_preference_compares_within_neighbourhoods_only"),
    Mutant("PPI's edges in one direction", "datasets/ppi.py::_graphs",
           "np.concatenate([source * len(ids) + target, target * len(ids) + source])",
           "source * len(ids) + target",
           "datasets/test_ppi.py::test_equals_torch_geometric"),
    # Images and SimCLR
    Mutant("a view is its own negative", "few_labels/simclr.py::nt_xent_loss",
           "similarity[row, row] = float('-inf')", "pass", LOSS),
    Mutant("the positive is the next row", "few_labels/simclr.py::nt_xent_loss",
           "row.roll(len(z1))", "row.roll(1)", LOSS),
    Mutant("both views are the same", "images.py::Batches",
           "yield (first, normalize(self.augment(images, size, own)))", "yield (first, first)",
           "test_images.py::test_without_labels_a_batch_is_two_views_and_parts_share_it"),
    Mutant("every image is mirrored", "images.py::crop_parameters",
           "0.5 * flip", "1.0 * flip",
           "test_images.py::test_crops_stay_inside_keep_their_share_and_are_mirrored_half_the_time"),
    Mutant("numbers that are reported from train mode", "images.py::outputs",
           "model.training", "False", "test_images.py::test_outputs_are_float32_of_the_eval_mode"),
    # Few labels
    Mutant("the probe's standardisation is not folded in", "few_labels/transfer.py::linear_probe",
           "bias - weight @ torch.from_numpy(scaler.mean_)", "bias", PROBE),
    Mutant("fine-tuning from a random head", "few_labels/transfer.py::fine_tune",
           "linear_probe(outputs(encoder, images, recipe.size), labels, classes, C)",
           "nn.Linear(outputs(encoder, images, recipe.size).shape[1], classes)",
           f"{TRANSFER}::test_fine_tuning_starts_from_the_probe_and_leaves_the_encoder_alone"),
    Mutant("frequent classes count more in the loss", "few_labels/transfer.py::train_on",
           "F.cross_entropy(logits, batch[1], F.pad(weight, (0, absent)))", "F.cross_entropy(logits, batch[1])",
           f"{TRANSFER}::test_every_class_counts_the_same_in_the_loss"),
    # LoRA
    Mutant("A and B both zero", "few_labels/lora.py::LowRank",
           "nn.init.zeros_(self.B.weight)", "nn.init.zeros_(self.A.weight), nn.init.zeros_(self.B.weight)",
           f"{LORA}::test_start_and_scale"),
    Mutant("the frozen network learns", "few_labels/lora.py::add_lora",
           "model.requires_grad_(False)", "model",
           f"{LORA}::test_the_function_is_unchanged_at_first_and_the_frozen_network_for_good"),
    Mutant("alpha / rank, whatever the scaling", "few_labels/lora.py::LowRank",
           "rank if scaling == 'standard' else math.sqrt(rank)", "rank", f"{LORA}::test_start_and_scale"),
    Mutant("merging forgets the scale", "few_labels/lora.py::merge_lora", "update.scale * BA", "BA", PEFT),
    # Training, files, results
    Mutant("resuming forgets the optimizer", "training.py::_resume",
           "parts if 'rng' in state else ['model']", "['model']", RESUMED),
    Mutant("a changed setting finds the old run", "training.py::run_file",
           "json.dumps(settings, sort_keys=True)", "json.dumps(sorted(settings))",
           f"{TRAINING}::test_another_setting_is_another_file"),
    Mutant("a loss of NaN goes on", "training.py::train_step",
           "not math.isfinite(value)", "False",
           f"{TRAINING}::test_a_loss_that_is_not_finite_stops_before_the_step"),
    Mutant("a score of NaN is the best for good", "training.py::fit",
           "(best['value'] if best else -math.inf) < row[keep_best] < math.inf",
           "best is None or best['value'] < row[keep_best]",
           f"{TRAINING}::test_a_score_that_is_not_finite_is_no_best"),
    Mutant("digest of weights not checked", "weights.py::load_weights",
           "found != listed", "False", "test_weights.py::test_a_damaged_file_is_named"),
    Mutant("files with another MD5 are taken", "datasets/sources.py::verify_md5",
           "not check_md5(folder / name, md5)", "False",
           "datasets/test_sources.py::test_damaged_local_file_is_named_never_used_and_fetched_again"),
    Mutant("a stand-in where real data are required", "datasets/sources.py::obtain",
           "flag('PDL_REQUIRE_REAL')", "False", "datasets/test_sources.py::test_require_real_says_what_to_do"),
    Mutant("figures do not name a stand-in", "datasets/sources.py::Provenance",
           "'' if self.real else f' · stand-in for {self.name}'", "''",
           "test_notebook.py::test_a_stand_in_is_named_wherever_its_tag_goes"),
    Mutant("standard deviation of the population", "notebook.py::Run",
           "len(numbers) - 1", "len(numbers)", RECORDED),
    Mutant("the fast profile writes results", "notebook.py::record",
           "self.profile.name == 'full'", "True", RECORDED),
]
# fmt: on


class Replace(ast.NodeTransformer):
    """Replaces what equals `old`, an expression or a statement, and counts how often it was there."""

    def __init__(self, old: ast.stmt, new: ast.stmt) -> None:
        whole = isinstance(old, ast.Expr) and isinstance(new, ast.Expr)
        self.old, self.new = (old.value, new.value) if whole else (old, new)
        self.count = 0

    def visit(self, node: ast.AST) -> ast.AST:
        if ast.dump(node) == ast.dump(self.old):
            self.count += 1
            return self.new
        return self.generic_visit(node)


def mutate(mutant: Mutant, package: Path) -> tuple[Path, str]:
    """The mutant's file, and its text with the mistake."""
    name, _, function = mutant.where.partition("::")
    tree = ast.parse((package / name).read_text(encoding="utf-8"))
    places = [node for node in ast.walk(tree) if getattr(node, "name", None) == function and hasattr(node, "body")]
    replacing = Replace(ast.parse(mutant.old).body[0], ast.parse(mutant.new).body[0])
    for place in places:
        replacing.visit(place)
    if replacing.count != 1:
        sys.exit(f"stale: {mutant.name}: its code stands {replacing.count} times in {mutant.where}, not once")
    return package / name, ast.unparse(ast.fix_missing_locations(tree))


def passes(tests: set[str], copy: Path) -> bool:
    """Do the tests, FILE::NAME each, pass in the copy?"""
    files, names = zip(*(test.split("::") for test in sorted(tests)), strict=True)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", " or ".join(names)]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "PDL_OFFLINE": "1"}
    command += [f"tests/{file}" for file in sorted(set(files))]
    ran = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    # 0: all passed, 1: some failed. A mutant that cannot be imported (2) proves nothing about the tests.
    if ran.returncode not in (0, 1):
        sys.exit(f"stale: {', '.join(names)}: pytest exits with {ran.returncode}\n{ran.stdout}")
    return ran.returncode == 0


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(w.lower() in f"{m.name} {m.where}".lower() for w in words)]
    survived = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder).resolve()
        for name in COPIED:
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
        mutated = {mutant: mutate(mutant, copy / "pdl_utils") for mutant in chosen}
        if not passes({mutant.test for mutant in chosen}, copy):
            sys.exit("stale: a test fails without a mistake")
        print("unchanged, all tests pass\n\n| mutant | in | |\n|---|---|---|", flush=True)
        for mutant, (file, text) in mutated.items():
            original = file.read_text(encoding="utf-8")
            file.write_text(text, encoding="utf-8")
            caught = not passes({mutant.test}, copy)
            file.write_text(original, encoding="utf-8")
            survived += not caught
            print(f"| {mutant.name} | {mutant.where} | {'caught' if caught else 'SURVIVED'} |", flush=True)
    print(f"\n{len(chosen) - survived} of {len(chosen)} caught")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
