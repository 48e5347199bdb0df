"""bench/outside.py on small stand-ins in the layout of TRL's, math-verify's and Jigsaw-R1's checkouts.

Each stand-in is written here, right or with one mistake: a comparison that cannot notice a difference shows nothing.
"""

import json
import sys

import pytest
import torch
from commands import ROOT

from records import DataError

sys.path.append(str(ROOT / "bench"))
import outside  # noqa: E402

HELPERS = '''
def nanstd(tensor, dim=None):
    return tensor.std(dim) if dim is not None else tensor.std()
def nanmin(tensor): return tensor
def nanmax(tensor): return tensor
def entropy_from_logits(logits): return logits
def selective_log_softmax(logits, index) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]
'''
GRPO = '''
from somewhere import that_is_not_here
class GRPOTrainer(that_is_not_here.Trainer):
    def _generate_and_score_completions(self, inputs: list[Missing]) -> dict:
        if self.multi_objective_aggregation == "sum_then_normalize":
            rewards = (rewards_per_func * self.reward_weights).sum(1).view(-1, num_generations)
            mean = rewards.mean(1, keepdim=True)
            std = nanstd(rewards, 1)[:, None] if self.scale_rewards == "group" else nanstd(rewards)
            advantages = (rewards - mean).view(-1)
            if self.scale_rewards != "none":
                advantages = ((rewards - mean) / (std + 1e-4)).view(-1)
    def _compute_loss(self, model: Missing, inputs):
        mask = inputs["completion_mask"]
        logp, _, _ = self._get_per_token_logps_and_entropies(model)
        log_ratio = logp - inputs["old_per_token_logps"]
        if self.importance_sampling_level == "sequence":
            log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1))[:, None]
        ratio = log_ratio.exp()
        advantage = inputs["advantages"][:, None]
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        loss = -torch.min(ratio * advantage, clipped * advantage)
        if self.beta:
            gap = inputs["ref_per_token_logps"] - logp
            loss = loss + self.beta * (gap.exp() - gap - 1)
        self._metrics["train"]["kl"].append(self.accelerator.gather(loss))
        if self.loss_type == "grpo":
            return ((loss * mask).sum(1) / mask.sum(1)).mean()
        if self.loss_type == "dr_grpo":
            return (loss * mask).sum() / (len(mask) * self.max_completion_length)
        return (loss * mask).sum() / mask.sum()
'''
DPO = '''
class DPOTrainer:
    def _compute_loss(self, model, inputs, return_outputs):
        logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
        mask = inputs["completion_mask"][:, 1:]
        logp = selective_log_softmax(logits, inputs["input_ids"][:, 1:]) * mask
        chosen, rejected = logp.sum(1).chunk(2)
        margin = (chosen - inputs["ref_chosen_logps"]) - (rejected - inputs["ref_rejected_logps"])
        loss = -F.logsigmoid(self.beta * margin).mean()
        for name, weight in zip(self.loss_types, self.loss_weights, strict=True):
            if name == "sft":
                loss = loss - weight * logp.chunk(2)[0].sum() / mask.chunk(2)[0].sum()
        return loss
'''
MATH_TESTS = '''
import pytest
@pytest.mark.parametrize(
    "gold, pred,expected",
    [("$5$", "$5$", 1), (r"\\frac{1}{2}", "0.5", True), ("5", "6", 0), ("5", "7", 1), ("no gold at all", "x y", 1),
     (str(3), "3", 1)],
)
def test_written_out(gold, pred, expected): ...
@pytest.mark.parametrize("gold,pred,strict,expected", [("f(x)", "f(y)", False, 1)])
def test_with_another_column(gold, pred, strict, expected): ...
@pytest.mark.parametrize("text", ["a", "b"])
def test_of_something_else(text): ...
def helper(): ...
'''
REWARD = '''
def process_jigsaw_string(m, n, text): return [int(word) for word in re.findall("[0-9]+", text)]
def verify_math(pred, gt): return float(parse(str(pred)) == parse(str(gt)))
def score_boxes(box_pred, box_gt): return 0.0
def score_points(box_pred, box_gt): return 0.0
def score_jigsaw_patches(pred, gold): return sum(a == b for a, b in zip(pred, gold)) / len(gold)
def extract_answer(output, m=None, n=None, answer_type="grid", think=True):
    inside = re.search("<answer>(.*?)</answer>", output, re.S) if think else None
    text = (inside[1] if inside else output).strip()
    return process_jigsaw_string(m, n, text) if answer_type == "grid" else text
def accuracy_reward_helper(pred, gt, answer_type):
    part = score_jigsaw_patches(pred, gt) if answer_type == "grid" else 0.0
    return part, float(str(pred) == str(gt))
def format_reward(completions, **args):
    return [float("<answer>" in completion[0]["content"]) for completion in completions]
'''
PUZZLES = '''
def create_grid_jigsaw_image(image, m, n):
    width, height = image.size[0] // n, image.size[1] // m
    order = list(range(m * n))
    random.shuffle(order)
    mixed = Image.new("RGB", image.size)
    for place, original in enumerate(order):
        left, top = original % n * width, original // n * height
        piece = image.crop((left, top, left + width, top + height))
        mixed.paste(piece, (place % n * width, place // n * height))
    return mixed, [original + 1 for original in order], [order.index(place) + 1 for place in range(m * n)]
'''
FILES = {
    "trl/trl/trainer/utils.py": HELPERS,
    "trl/trl/trainer/grpo_trainer.py": GRPO,
    "trl/trl/trainer/dpo_trainer.py": DPO,
    "Math-Verify/tests/test_small.py": MATH_TESTS,
    "Jigsaw-R1/utils/reward.py": REWARD,
    "Jigsaw-R1/utils/jigsaw_utils.py": PUZZLES,
}


def lay_out(folder, changes=()):
    """The stand-ins below a folder; changes: {file: (old text, new text)}."""
    changes = dict(changes)
    for name, text in FILES.items():
        old, new = changes.get(name, ("", ""))
        assert old in text
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(old, new) if old else text)
    return folder


@pytest.fixture
def tally():
    return outside.Tally()


def disagreeing(tally):
    return {name for name, row in tally.rows().items() if row["agreed"] < row["tried"]}


def test_losses_and_advantages_that_are_the_same_agree_and_each_class_is_tried(tmp_path, tally):
    outside.compare_trl(lay_out(tmp_path) / "trl", 12, tally)
    rows = tally.rows()
    assert len(rows) == 3 + len(outside.GRPO_CASES) + 2
    assert all(row["tried"] == row["agreed"] == 12 and row["disagreements"] == [] for row in rows.values())


GRPO_FILE, DPO_FILE = "trl/trl/trainer/grpo_trainer.py", "trl/trl/trainer/dpo_trainer.py"
MISTAKES = {
    "eps": (GRPO_FILE, "std + 1e-4", "std + 1e-2", {"TRL: advantages, scale group", "TRL: advantages, scale batch"}),
    "clip": (GRPO_FILE, "1 + self.epsilon_high", "1 + self.epsilon_low", "TRL: GRPO"),
    "kl": (GRPO_FILE, "gap.exp() - gap - 1", "gap**2 / 2", "with KL"),
    "constant": (GRPO_FILE, "self.max_completion_length", "mask.shape[1]", {"TRL: GRPO, Dr. GRPO"}),
    "margin": (DPO_FILE, "self.beta * margin", "2 * self.beta * margin", {"TRL: DPO", "TRL: DPO+SFT"}),
    "sft": (DPO_FILE, "mask.chunk(2)[0].sum()", "len(mask)", {"TRL: DPO+SFT"}),
    "gradient": (DPO_FILE, ".logits[:, :-1]", ".logits[:, :-1].detach() + 0 * model().logits[:, :-1]",
                 {"TRL: DPO", "TRL: DPO+SFT"}),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_one_formula_is_a_disagreement_of_its_classes(tmp_path, tally, mistake):
    file, old, new, classes = MISTAKES[mistake]
    outside.compare_trl(lay_out(tmp_path, {file: (old, new)}) / "trl", 12, tally)
    found = disagreeing(tally)
    if isinstance(classes, str):
        assert found and all(classes in name or "DAPO" in name for name in found)
    else:
        assert found == classes
    assert all(len(tally.rows()[name]["disagreements"]) <= outside.SHOWN for name in found)


def test_cases_are_read_from_tests_that_state_gold_reply_and_verdict_in_writing(tmp_path):
    folder = lay_out(tmp_path)
    cases = list(outside.math_cases(folder / "Math-Verify/tests/test_small.py"))
    assert [case[0] for case in cases] == ["test_written_out"] * 5
    assert cases[0][1:] == ("$5$", "$5$", True) and cases[2][1:] == ("5", "6", False)


def test_verdicts_are_counted_by_test_and_texts_of_others_are_not_kept(tmp_path, tally, capsys):
    outside.compare_math(lay_out(tmp_path) / "Math-Verify", tally)
    rows = tally.rows()
    golds = rows["math-verify: golds that ours can score"]
    right, wrong = (rows[f"math-verify: {word} answers, test_written_out"] for word in ("right", "wrong"))
    assert (golds["tried"], golds["agreed"]) == (5, 4)
    assert (right["tried"], right["agreed"], wrong["tried"], wrong["agreed"]) == (3, 2, 1, 1)
    case = {"case": "test_small.py::test_written_out, 3", "theirs": True, "ours": False}
    assert right["disagreements"] == [case]
    assert "gold '5', reply '7'" in capsys.readouterr().out and "no gold" not in json.dumps(rows)


@pytest.fixture
def no_math_verify(monkeypatch):
    """A math_verify whose parse gives the text back: the real one is no requirement of ours."""
    stand_in = type(sys)("math_verify")
    stand_in.parse, stand_in.verify = str, str.__eq__
    monkeypatch.setitem(sys.modules, "math_verify", stand_in)


def test_replies_as_asked_agree_and_a_scorer_that_takes_less_is_noticed(tmp_path, tally, no_math_verify):
    outside.compare_jigsaw(lay_out(tmp_path) / "Jigsaw-R1", 400, tally)
    rows = tally.rows()
    for kind in ("letter", "digit", "grid"):
        row = rows[f"Jigsaw-R1: accuracy, {kind}, as asked"]
        assert row["tried"] == row["agreed"] > 5, kind
    assert "Jigsaw-R1: accuracy, box, as asked" in disagreeing(tally)  # the stand-in scores no box
    assert sum(row["tried"] for name, row in rows.items() if ": format, " in name) == 400


@pytest.mark.parametrize("inverse", [False, True])
def test_permutations_the_other_way_round_are_noticed(tmp_path, tally, no_math_verify, inverse):
    wrong = ("return mixed, [original + 1 for original in order], ", "return mixed, ")
    changes = {"Jigsaw-R1/utils/jigsaw_utils.py": (wrong[0], wrong[1] + "*[[order.index(place) + 1 for place in "
               "range(m * n)]], ")} if inverse else {}  # fmt: skip
    outside.compare_jigsaw(lay_out(tmp_path, changes) / "Jigsaw-R1", 1000, tally)
    row = tally.rows()["Jigsaw-R1: permutations the same way round"]
    assert row["tried"] == 20 and (row["agreed"] < 20) == inverse


def test_numbers_are_kept_with_what_was_compared_and_shown_on_the_page(tmp_path, monkeypatch, no_math_verify):
    page = tmp_path / "answers.md"
    page.write_text("before\n<!-- outside: rebuilt by bench/outside.py -->\nold\n<!-- end of outside -->\nafter\n")
    monkeypatch.setattr(outside, "PAGE", page)
    out = tmp_path / "outside.json"
    assert outside.main(["--folder", str(lay_out(tmp_path)), "--count", "3", "--out", str(out)]) == 0
    kept = json.loads(out.read_text())
    assert kept["compared with"].keys() == {"TRL", "math-verify", "Jigsaw-R1"}
    assert outside.main(["--check", "--out", str(out)]) == 1
    assert outside.main(["--table", "--out", str(out)]) == 0
    assert outside.main(["--check", "--out", str(out)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| TRL: DPO | 3 | 3 |" in text
    assert "| math-verify: right answers | 3 | 2 |" in text
    assert "\nold\n" not in text


def test_the_page_shows_the_kept_numbers():
    assert outside.main(["--check"]) == 0


def test_what_is_not_there_or_of_another_shape_is_one_line(tmp_path, tally):
    with pytest.raises(DataError, match="holds none of trl, Math-Verify, Jigsaw-R1"):
        outside.compare(tmp_path, 1)
    folder = lay_out(tmp_path, {GRPO_FILE: ("_compute_loss", "_another_loss")})
    with pytest.raises(DataError, match="grpo_trainer.py: has no function _compute_loss"):
        outside.compare_trl(folder / "trl", 1, tally)
    (folder / DPO_FILE).write_text("class Broken(")
    with pytest.raises(DataError, match="cannot be read as Python"):
        list(outside.definitions(folder / DPO_FILE))
    torch.manual_seed(0)
    with pytest.raises(SystemExit):
        outside.parse_args([])
