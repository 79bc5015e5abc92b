"""Would the tests notice? Deliberate mistakes, one at a time, in a copy of the package.

    python tests/mutants.py              all of them (`make mutants`)
    python tests/mutants.py graph hook   those whose name or file holds one of these words

A mutant replaces one expression or statement of a function, found in its syntax tree: spaces, line breaks,
quotes and comments do not matter. The tests that ought to catch it pass on the unchanged copy first; it is caught
if one of them then fails. Exits with 1 if a mutant survives, and with 2 if the check itself is stale: code that is
not there exactly once, tests that do not exist or do not pass.

The tests run in forked processes, so that torch is imported once, not for every mutant (needs a POSIX system).
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("pdl_utils", "scripts", "tests", "pyproject.toml")
# What tests import and pdl_utils is not: inherited by every fork. Absent ones are the tests' business.
PRELOADED = (
    "pytest", "pytest_timeout", "torchvision.datasets", "torchvision.models", "torchvision.transforms.v2",
    "torch_geometric.nn", "torch_geometric.datasets", "captum.attr", "lightly.loss", "peft", "filelock",
    "matplotlib.pyplot", "IPython.display", "skimage.data", "sklearn.datasets", "scipy.stats", "safetensors.torch",
)  # fmt: skip

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
    Mutant("softmax subtracts the batch's maximum", "graphs/edges.py::edge_softmax",
           "scores - top.index_select(0, graph.target)", "scores - top.max()",
           f"{GRAPHS}::test_attention_rows_sum_to_one_beside_huge_scores"),
    Mutant("softmax over sources, not targets", "graphs/edges.py::edge_softmax",
           "weight / total.index_select(0, graph.target)", "weight / total.index_select(0, graph.source)",
           f"{GRAPHS}::test_attention_equals_torch_geometric"),
    Mutant("GATv2 puts its vector before the LeakyReLU", "graphs/edges.py::pair_scores",
           "F.leaky_relu(pair, negative_slope) @ att", "F.leaky_relu(pair * att, negative_slope).sum(-1)", PYG),
    Mutant("GCN scales by the target's degree alone", "graphs/layers.py::GCNConv",
           "scale[graph.source] * scale[graph.target]", "scale[graph.target] * scale[graph.target]", PYG),
    Mutant("attention dropped in evaluation, too", "graphs/layers.py::AttentionConv",
           "F.dropout(attention, self.dropout, self.training)", "F.dropout(attention, self.dropout)",
           f"{GRAPHS}::test_attention_is_dropped_in_training_only"),
    Mutant("micro-F1 takes logits for probabilities", "graphs/metrics.py::micro_f1",
           "logits > 0", "logits > 0.5", f"{GRAPH_MEASURES}::test_micro_f1"),
    Mutant("Dirichlet energy a node becomes one an edge", "graphs/metrics.py::dirichlet_energy",
           "graph.num_nodes", "len(graph.source)", f"{GRAPH_MEASURES}::test_dirichlet_energy"),
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
           "['model'] if finished else parts", "['model']", RESUMED),
    Mutant("a changed setting finds the old run", "training.py::run_file",
           "json.dumps(settings, sort_keys=True)", "json.dumps(sorted(settings))",
           f"{TRAINING}::test_another_setting_is_another_file"),
    Mutant("a loss of NaN goes on", "training.py::_train_epoch",
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
           "datasets/test_sources.py::test_damaged_local_file_is_never_used_offline"),
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


class Stale(Exception):
    """The check no longer fits the code or the tests."""


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
        raise Stale(f"{mutant.name}: its code stands {replacing.count} times in {mutant.where}, not once")
    return package / name, ast.unparse(ast.fix_missing_locations(tree))


class Watch:
    """A pytest plugin: runs the tests whose names begin with one of `wanted`, and remembers the first failure."""

    def __init__(self, wanted: list[str]) -> None:
        self.wanted, self.ran = wanted, 0
        self.failed: str | None = None

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid.removeprefix("tests/").startswith(tuple(self.wanted))]

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.ran += report.when == "call"
        if report.failed and self.failed is None:
            self.failed = report.nodeid.removeprefix("tests/")


def run_tests(original: Path, tests: list[str], mutant: Mutant | None = None) -> tuple[str, str]:
    """Run tests in a fresh copy of `original`, mutated or not, in a process of its own: the test that failed
    first, or "", and pytest's output."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(shutil.copytree(original, folder, dirs_exist_ok=True)).resolve()
        if mutant:
            file, text = mutate(mutant, copy / "pdl_utils")
            file.write_text(text, encoding="utf-8")
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                os._exit(in_copy(copy, tests))
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(99)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output = (copy / "output").read_text(errors="replace")
        # 0: all passed, 1: some failed. A mutant that cannot be imported (2) proves nothing about the tests.
        if status not in (0, 1):
            raise Stale(f"{mutant.name if mutant else 'unchanged'}: pytest exits with {status}\n{output}")
        return (copy / "failed").read_text(), output


def in_copy(copy: Path, tests: list[str]) -> int:
    """The forked process: pytest in the copy; its exit status."""
    log = os.open(copy / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(copy)
    sys.path[:] = [str(copy), *(p for p in sys.path if p and Path(p).resolve() not in (ROOT, ROOT / "tests"))]
    sys.dont_write_bytecode = True
    os.environ |= {
        "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PDL_OFFLINE": "1", "PDL_PROGRESS": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    import pytest
    import torch

    import pdl_utils

    if not Path(pdl_utils.__file__).is_relative_to(copy):
        raise Stale(f"{pdl_utils.__file__} would be tested, not the copy")
    torch.set_num_threads(1)
    watch = Watch(tests)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--timeout=120", "--tb=short"]
    files = {f"tests/{test.partition('::')[0]}" for test in tests}
    status = pytest.main([*options, "--basetemp", str(copy / "tmp"), *sorted(files)], plugins=[watch])
    (copy / "failed").write_text(watch.failed or "")
    sys.stdout.flush()
    sys.stderr.flush()
    return int(status) if watch.ran else 5  # pytest's "no tests"


def check(chosen: list[Mutant], original: Path) -> list[str]:
    """Try the mutants, print what became of each, and return the names of those that survived."""
    for mutant in chosen:
        mutate(mutant, original / "pdl_utils")  # all code is looked for before any test runs
    for test in dict.fromkeys(mutant.test for mutant in chosen):
        failed, output = run_tests(original, [test])
        if failed:
            raise Stale(f"unchanged, {failed} fails\n{output}")
    print("unchanged, all tests pass\n\n| mutant | in | | by |\n|---|---|---|---|", flush=True)
    survived = []
    for mutant in chosen:
        failed, _ = run_tests(original, [mutant.test], mutant)
        if not failed:
            survived.append(mutant.name)
        print(f"| {mutant.name} | {mutant.where} | {'caught' if failed else 'SURVIVED'} | {failed} |", flush=True)
    return survived


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(w.lower() in f"{m.name} {m.where}".lower() for w in words)]
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
    try:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            original = Path(folder)  # what is tested, as it is now: the checkout may change while this runs
            for name in COPIED:
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copy(ROOT / name, original / name)
            survived = check(chosen, original)
    except Stale as error:
        print(f"stale: {error}", file=sys.stderr)
        return 2
    print(f"\n{len(chosen) - len(survived)} of {len(chosen)} caught in {time.perf_counter() - started:.0f} s")
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
