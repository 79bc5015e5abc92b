"""Would the tests notice? Deliberate mistakes, one at a time, in a copy of the package.

    python tests/mutants.py              all of them (`make mutants`)
    python tests/mutants.py graph hook   those whose name or file holds one of these words

Every mutant is one exact replacement of text and the few tests that ought to catch it. The tests pass on
the unchanged copy first; a mutant is caught if one of them then fails. Exits with 1 if a mutant
survives, and with 2 if the check itself is stale: a text that is not there exactly once, tests that do not
exist or do not pass.

The tests run in forked processes, so that torch is imported once, not for every mutant (needs a POSIX system).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("pdl_utils", "tests", "pyproject.toml")
# What tests import and pdl_utils is not: inherited by every fork. Absent ones are the tests' business.
PRELOADED = (
    "pytest", "pytest_timeout", "torchvision.datasets", "torchvision.models", "torchvision.transforms.v2",
    "torch_geometric.nn", "torch_geometric.datasets", "captum.attr", "lightly.loss", "peft", "filelock",
    "matplotlib.pyplot", "IPython.display", "skimage.data", "sklearn.datasets", "scipy.stats", "safetensors.torch",
)  # fmt: skip


class Mutant(NamedTuple):
    """A mistake that somebody could make: in `file` of the package, `old` becomes `new`. `tests` names
    the tests that ought to catch it, all cases of one without its brackets."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]


FORMULA = "test_grad_cam.py::test_maps_are_those_of_the_formula[layer4.1.bn2]"
LOSS = [
    "test_simclr.py::test_the_loss_and_its_gradient_equal_those_of_lightly",
    "test_simclr.py::test_the_loss_by_hand",
    "test_simclr.py::test_nobody_is_its_own_negative_or_positive",
    "test_simclr.py::test_uninformed_embeddings_score_log_of_the_number_of_others",
]

MUTANTS = [
    # Grad-CAM
    Mutant(
        "Grad-CAM with the wrong sign",
        "grad_cam.py",
        "m if signed else m.relu()",
        "m if signed else (-m).relu()",
        [FORMULA],
    ),
    Mutant(
        "only positive gradients weigh channels",
        "grad_cam.py",
        "alpha = at_least_float32(gradients).mean((3, 4))",
        "alpha = at_least_float32(gradients).relu().mean((3, 4))",
        [FORMULA],
    ),
    Mutant(
        "guided ReLU lets the negative pass",
        "grad_cam.py",
        "gradient.clamp(min=0)",
        "gradient.clamp(max=0)",
        ["test_grad_cam.py::test_guided_backprop_is_captums"],
    ),
    Mutant(
        "maps enlarged with corners aligned",
        "grad_cam.py",
        "align_corners=False",
        "align_corners=True",
        ["test_grad_cam.py::test_enlarged_cells_cover_their_part_of_the_image"],
    ),
    Mutant(
        "in-place ReLU overwrites what a hook kept",
        "hooks.py",
        "return output.clone()",
        "return output",
        [FORMULA],
    ),
    Mutant(
        "hooks stay on the model",
        "hooks.py",
        "        for handle in handles:\n            handle.remove()",
        "        pass",
        ["test_grad_cam.py::test_the_model_is_left_as_it_was"],
    ),
    Mutant(
        "train mode in evaluation",
        "hooks.py",
        "    model.eval()\n",
        "",
        ["test_grad_cam.py::test_frozen_no_grad_inference_train_mode_and_channels_last_agree"],
    ),
    # Measures of maps
    Mutant(
        "pointing game off by one",
        "cam_metrics.py",
        "(x <= x1)",
        "(x < x1)",
        ["test_cam_metrics.py::test_pointing_game_at_the_corners"],
    ),
    Mutant(
        "deletion takes the least important first",
        "cam_metrics.py",
        "descending=True",
        "descending=False",
        ["test_cam_metrics.py::test_insertion_and_deletion_follow_the_order_of_the_map"],
    ),
    # Graphs
    Mutant(
        "softmax over sources, not targets",
        "graph.py",
        "    index = graph.target.unsqueeze(1).expand_as(scores)\n"
        "    shape = (graph.num_nodes, scores.shape[1])\n"
        '    top = scores.new_full(shape, -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")\n'
        "    weight = (scores - top.index_select(0, graph.target)).exp()\n"
        "    total = weight.new_zeros(shape).index_add(0, graph.target, weight)\n"
        "    return weight / total.index_select(0, graph.target)",
        "    index = graph.source.unsqueeze(1).expand_as(scores)\n"
        "    shape = (graph.num_nodes, scores.shape[1])\n"
        '    top = scores.new_full(shape, -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")\n'
        "    weight = (scores - top.index_select(0, graph.source)).exp()\n"
        "    total = weight.new_zeros(shape).index_add(0, graph.source, weight)\n"
        "    return weight / total.index_select(0, graph.source)",
        [
            "test_graph_attention.py::test_attention_rows_sum_to_one_beside_huge_scores",
            "test_graph_attention.py::test_attention_equals_torch_geometric",
        ],
    ),
    Mutant(
        "softmax subtracts the batch's maximum",
        "graph.py",
        "scores - top.index_select(0, graph.target)",
        "scores - top.max()",
        ["test_graph_attention.py::test_attention_rows_sum_to_one_beside_huge_scores"],
    ),
    Mutant(
        "GATv2 puts its vector before the LeakyReLU",
        "graph.py",
        "(F.leaky_relu(pair, negative_slope) * att).sum(-1)",
        "F.leaky_relu(pair * att, negative_slope).sum(-1)",
        ["test_graph_attention.py::test_fast_path_equals_plain"],
    ),
    Mutant(
        "GCN scales by the target's degree alone",
        "graph_attention.py",
        "scale[graph.source] * scale[graph.target]",
        "scale[graph.target] * scale[graph.target]",
        ["test_graph_attention.py::test_equals_torch_geometric[gcn-one edge-True-True-dtype0-1e-10]"],
    ),
    Mutant(
        "attention dropped in evaluation, too",
        "graph_attention.py",
        "F.dropout(attention, self.dropout, self.training)",
        "F.dropout(attention, self.dropout)",
        ["test_graph_attention.py::test_attention_is_dropped_in_training_only"],
    ),
    Mutant(
        "backward pass mixes up the edges' weights",
        "fast_attention.py",
        "_bags(weight[order], grad",
        "_bags(weight, grad",
        ["test_graph_attention.py::test_gradients_against_finite_differences"],
    ),
    Mutant(
        "a query's gradient goes to the source",
        "fast_attention.py",
        "grad_query[k].index_add_(0, graph.target[tile], slope)",
        "grad_query[k].index_add_(0, graph.source[tile], slope)",
        ["test_graph_attention.py::test_gradients_against_finite_differences"],
    ),
    Mutant(
        "micro-F1 takes logits for probabilities",
        "graph_metrics.py",
        "predicted, wanted = logits > 0, labels > 0.5\n    found",
        "predicted, wanted = logits > 0.5, labels > 0.5\n    found",
        ["test_graph_attention.py::test_micro_f1"],
    ),
    Mutant(
        "Dirichlet energy a node becomes one an edge",
        "graph_metrics.py",
        "if relative else graph.num_nodes",
        "if relative else len(graph.source)",
        ["test_graph_attention.py::test_dirichlet_energy"],
    ),
    # SimCLR
    Mutant(
        "self-pair not masked",
        "simclr.py",
        '        similarity[row, 2 * n * rank + row] = float("-inf")',
        "        pass",
        LOSS,
    ),
    Mutant(
        "the positive is the next row",
        "simclr.py",
        "(row + n) % (2 * n)",
        "(row + 1) % (2 * n)",
        LOSS,
    ),
    Mutant(
        "embeddings not normalised",
        "simclr.py",
        "F.normalize(z.float() if z.element_size() < 4 else z, dim=1)",
        "(z.float() if z.element_size() < 4 else z)",
        LOSS,
    ),
    Mutant(
        "features in train mode",
        "evaluation.py",
        "if model.training:",
        "if False:",
        ["test_simclr.py::test_features_are_those_of_the_eval_mode_and_the_encoder_is_left_alone"],
    ),
    Mutant(
        "both views are the same",
        "simclr.py",
        "return augment(images, size, generator), augment(images, size, generator)",
        "return (augment(images, size, generator),) * 2",
        ["test_simclr.py::test_views_differ_from_each_other_and_follow_from_the_generator"],
    ),
    Mutant(
        "every image is mirrored",
        "augment.py",
        "< 0.5 * flip",
        "< 1.0 * flip",
        ["test_pretrain.py::test_half_of_the_images_are_mirrored"],
    ),
    Mutant(
        "bytes standardised as if they were 0..1",
        "augment.py",
        "scale = 255.0 if images.dtype == torch.uint8 else 1.0",
        "scale = 1.0",
        ["test_pretrain.py::test_normalize_takes_bytes_and_floats_alike"],
    ),
    # Few labels
    Mutant(
        "the probe's standardisation is not folded in",
        "evaluation.py",
        "    weight = weight / torch.from_numpy(scaler.scale_)\n"
        "    bias = bias - weight @ torch.from_numpy(scaler.mean_)\n",
        "",
        ["test_few_labels.py::test_the_probe_is_scikit_learns_logistic_regression"],
    ),
    Mutant(
        "fine-tuning from a random head",
        "few_labels.py",
        "tuned.fc = linear_probe(outputs(tuned, images, recipe.size), labels, classes, C)",
        "tuned.fc = nn.Linear(network.fc.in_features, classes)",
        ["test_few_labels.py::test_fine_tuning_starts_from_the_probe_and_does_not_touch_the_pretrained_network"],
    ),
    Mutant(
        "as many epochs as there should be steps",
        "few_labels.py",
        "-(-recipe.steps // (len(images) // batch_size))",
        "recipe.steps",
        ["test_few_labels.py::test_every_set_of_labels_gets_the_same_number_of_steps"],
    ),
    Mutant(
        "frequent classes count more in the loss",
        "few_labels.py",
        "return (each * weight[batch[1]]).sum() / weight[batch[1]].sum()",
        "return each.mean()",
        ["test_few_labels.py::test_every_class_counts_the_same_in_the_loss"],
    ),
    Mutant(
        "frequent classes count more in the probe",
        "evaluation.py",
        'class_weight="balanced", ',
        "",
        ["test_few_labels.py::test_the_probe_is_scikit_learns_logistic_regression"],
    ),
    Mutant(
        "batch norm not frozen in fine-tuning",
        "few_labels.py",
        "            if isinstance(norm, nn.BatchNorm2d):",
        "            if False:",
        ["test_few_labels.py::test_frozen_norms_compute_what_they_did_in_eval_mode_and_stay"],
    ),
    Mutant(
        "a shipped encoder is not gone on from",
        "pretrain_simclr.py",
        "            (model if whole else model.encoder).load_state_dict(weights)",
        "            pass",
        ["test_simclr.py::test_the_program_ships_an_encoder_and_goes_on_from_it"],
    ),
    # LoRA
    Mutant(
        "A and B both zero",
        "lora.py",
        "            init_a(self.A)",
        "            self.A.zero_()",
        ["test_lora.py::test_start_and_scale"],
    ),
    Mutant(
        "backbone not frozen",
        "lora.py",
        "    model.requires_grad_(False)",
        "    pass",
        ["test_lora.py::test_parameters_of_the_paper_sized_mlp_at_rank_1"],
    ),
    Mutant(
        "alpha / rank, whatever the scaling",
        "lora.py",
        'alpha / (rank if scaling == "standard" else math.sqrt(rank))',
        "alpha / rank",
        ["test_lora.py::test_start_and_scale"],
    ),
    Mutant(
        "merging forgets the scale",
        "lora.py",
        ".view_as(x.weight) * x.lora.scale",
        ".view_as(x.weight)",
        ["test_lora.py::test_outputs_gradients_and_merged_weights_are_those_of_peft"],
    ),
    # Training, weights, results
    Mutant(
        "resuming forgets the optimizer",
        "training.py",
        '        optimizer.load_state_dict(state["optimizer"])\n',
        "",
        ["test_training.py::test_interrupted_and_resumed_equals_unbroken"],
    ),
    Mutant(
        "resuming repeats an epoch",
        "training.py",
        "first = len(history.rows)",
        "first = max(0, len(history.rows) - 1)",
        ["test_training.py::test_interrupted_and_resumed_equals_unbroken"],
    ),
    Mutant(
        "a loss of NaN goes on",
        "training.py",
        "if not math.isfinite(value):",
        "if False:",
        ["test_training.py::test_a_loss_that_is_not_finite_stops_before_the_step"],
    ),
    Mutant(
        "evaluated in train mode",
        "training.py",
        "        model.eval()\n        row =",
        "        row =",
        ["test_training.py::test_it_trains_in_train_mode_and_evaluates_in_eval_mode_without_gradients"],
    ),
    Mutant(
        "weights of NaN are saved",
        "training.py",
        "if not nn.utils.get_total_norm(",
        "if False and nn.utils.get_total_norm(",
        ["test_training.py::test_weights_that_are_not_finite_are_not_saved"],
    ),
    Mutant(
        "a score of NaN is the best for good",
        "training.py",
        '(best["value"] if best else -math.inf) < row[keep_best] < math.inf',
        '(best is None or best["value"] < row[keep_best])',
        ["test_training.py::test_a_score_that_is_not_finite_is_no_best"],
    ),
    Mutant(
        "a state to resume from may run code",
        "training.py",
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
        ["test_reliability.py::test_a_pickle_to_resume_from_is_not_run"],
    ),
    Mutant(
        "a failed write leaves its half",
        "settings.py",
        "        partial.unlink(missing_ok=True)",
        "        pass",
        ["test_training.py::test_a_write_that_fails_leaves_the_old_file_and_no_rest"],
    ),
    Mutant(
        "digest of weights not checked",
        "checkpoints.py",
        "if found != listed:",
        "if False:",
        ["test_checkpoints.py::test_a_damaged_file_is_named"],
    ),
    Mutant(
        "a grown network keeps its random blocks",
        "resnet.py",
        "            nn.init.zeros_(module.bn2.weight)",
        "            pass",
        ["test_pretrain.py::test_a_grown_network_computes_what_the_small_one_does"],
    ),
    Mutant(
        "standard deviation of the population",
        "results.py",
        "for v in numbers) / (len(numbers) - 1))",
        "for v in numbers) / len(numbers))",
        ["test_house.py::test_results_are_kept_in_the_full_profile_only"],
    ),
    Mutant(
        "two processes that record lose entries",
        "results.py",
        'with FileLock(FIGURES / ".results.json.lock"):',
        "if True:",
        ["test_reliability.py::test_processes_that_save_at_once_lose_nothing[results]"],
    ),
    Mutant(
        "two processes that save weights lose digests",
        "checkpoints.py",
        'with FileLock(path.parent / f".{DIGESTS}.lock"):',
        "if True:",
        ["test_reliability.py::test_processes_that_save_at_once_lose_nothing[digests]"],
    ),
    # Data
    Mutant(
        "test cells leak into the stand-in's training set",
        "datasets/stand_ins.py",
        "if ((row + 2 * column) % 5 == 0) == held_out",
        "if (row + 2 * column) % 5 == 0 or not held_out",
        ["test_datasets.py::test_texture_crops_of_train_and_test_share_no_pixel"],
    ),
    Mutant(
        "a stand-in although PDL_REQUIRE_REAL is set",
        "datasets/sources.py",
        'if data is None or (not data.provenance.real and flag("PDL_REQUIRE_REAL")):',
        "if data is None:",
        ["test_datasets.py::test_require_real_says_what_to_do"],
    ),
    Mutant(
        "MD5 of MNIST's files not checked",
        "datasets/sources.py",
        "if not check_md5(folder / name, md5):",
        "if False:",
        ["test_datasets.py::test_damaged_local_file_is_never_used_offline[mnist]"],
    ),
    Mutant(
        "a processed file of PPI may run code",
        "datasets/ppi.py",
        "torch.load(path, weights_only=True)",
        "path.stat()",
        ["test_reliability.py::test_a_pickle_among_the_processed_files_of_ppi_is_not_run"],
    ),
]


class Stale(Exception):
    """The check no longer fits the code or the tests."""


class Verdict(NamedTuple):
    """`failed`: the first test that did, or None; `ran`: how many were tried."""

    failed: str | None
    ran: int
    seconds: float
    output: str


class Watch:
    """A plugin that remembers the first failure."""

    def __init__(self) -> None:
        self.failed: str | None = None
        self.ran = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.ran += report.when == "call"
        if report.failed and self.failed is None:
            self.failed = report.nodeid.removeprefix("tests/")


def mutate(mutant: Mutant, package: Path) -> str:
    """The mutant's file, with its text replaced."""
    text = (package / mutant.file).read_text(encoding="utf-8")
    if (count := text.count(mutant.old)) != 1:
        raise Stale(f"{mutant.name}: its text occurs {count} times in {mutant.file}, not once:\n{mutant.old}")
    return text.replace(mutant.old, mutant.new)


def snapshot(folder: Path) -> Path:
    """What is tested, as it is now: the checkout may change while this runs."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def run_tests(original: Path, tests: list[str], mutant: Mutant | None = None) -> Verdict:
    """Run tests in a fresh copy of `original`, mutated or not, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(shutil.copytree(original, folder, dirs_exist_ok=True)).resolve()
        if mutant:
            file = copy / "pdl_utils" / mutant.file
            file.write_text(mutate(mutant, copy / "pdl_utils"), encoding="utf-8")
        started = time.perf_counter()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                os._exit(in_copy(copy, tests))
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(99)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seconds, output = time.perf_counter() - started, (copy / "output").read_text(errors="replace")
        # 0: all passed, 1: some failed. A mutant that cannot be imported (2) proves nothing about the tests.
        if status not in (0, 1):
            raise Stale(f"{mutant.name if mutant else 'unchanged'}: pytest exits with {status}\n{output}")
        return Verdict(**json.loads((copy / "verdict.json").read_text()), seconds=seconds, output=output)


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
    watch = Watch()
    plain = ["-x", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--timeout=120", "--tb=short"]
    status = pytest.main(
        [*plain, "--basetemp", str(copy / "tmp"), *(f"tests/{name}" for name in tests)], plugins=[watch]
    )
    (copy / "verdict.json").write_text(json.dumps({"failed": watch.failed, "ran": watch.ran}))
    sys.stdout.flush()
    sys.stderr.flush()
    return int(status)


def check(chosen: list[Mutant], original: Path) -> list[str]:
    """Try the mutants, print what became of each, and return the names of those that survived."""
    for mutant in chosen:
        mutate(mutant, original / "pdl_utils")  # all texts are looked for before any test runs
    verdict = run_tests(original, list(dict.fromkeys(test for m in chosen for test in m.tests)))
    if verdict.failed:
        raise Stale(f"unchanged, {verdict.failed} fails\n{verdict.output}")
    print(f"unchanged, all {verdict.ran} tests pass ({verdict.seconds:.0f} s)\n", flush=True)
    print("| mutant | file | | by | s |\n|---|---|---|---|---|")
    survived = []
    for mutant in chosen:
        verdict = run_tests(original, mutant.tests, mutant)
        if not verdict.failed:
            survived.append(mutant.name)
        caught = "caught" if verdict.failed else "SURVIVED"
        by = f"`{verdict.failed}`" if verdict.failed else f"{verdict.ran} tests passed"
        print(f"| {mutant.name} | {mutant.file} | {caught} | {by} | {verdict.seconds:.1f} |", flush=True)
    return survived


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if not words or any(w.lower() in f"{m.name} {m.file}".lower() for w in words)]
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
    try:
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            survived = check(chosen, snapshot(Path(folder)))
    except Stale as error:
        print(f"stale: {error}", file=sys.stderr)
        return 2
    print(f"\n{len(chosen) - len(survived)} of {len(chosen)} caught in {time.perf_counter() - started:.0f} s")
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
